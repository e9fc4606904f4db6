-- outside a transaction
-- What the reconciler has learned, by request: the worker asks for it before it tells the bot of an ending. An index
-- that a killed run has left invalid is taken away first.
drop index concurrently if exists webhook.deliveries_reconciled;
create index concurrently deliveries_reconciled on webhook.deliveries (request_id) where source = 'reconcile';
