-- outside a transaction
-- Finished deliveries by what is left of them and by age: the only question that retention asks. With the id, because a
-- worker finishes hundreds at the same moment. An index that a killed run has left invalid is taken away first.
drop index concurrently if exists webhook.deliveries_retention;
create index concurrently deliveries_retention on webhook.deliveries (pruned, done_at, id) where state = 'done';
