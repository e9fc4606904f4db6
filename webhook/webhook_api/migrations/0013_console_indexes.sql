-- outside a transaction
-- What a console asks of ten million rows (bench/table): a rare source, a rare status. What is common is found at once
-- from the end of the table, so only the rest is in an index. Indexes that a killed run has left invalid are taken away
-- first.
drop index concurrently if exists webhook.deliveries_other_source;
create index concurrently deliveries_other_source on webhook.deliveries (source, id) where source <> 'fal';
drop index concurrently if exists webhook.deliveries_other_status;
create index concurrently deliveries_other_status on webhook.deliveries (status, id) where status <> 'completed';
-- One index for the identity and for the request: ids are random, so each such index costs every insert and every update
-- a page that nobody else needs. 0014 puts it in the place of the two.
drop index concurrently if exists webhook.deliveries_event;
create unique index concurrently deliveries_event on webhook.deliveries (request_id, source, dedup_key);
