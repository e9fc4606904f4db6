-- outside a transaction
-- The rows that stood before 0004 are read here, statement by statement: validating, and building an index concurrently,
-- let deliveries in and workers work. Under a lock, ten million rows are half a minute without either.

alter table webhook.deliveries validate constraint deliveries_source;
alter table webhook.deliveries validate constraint deliveries_aside_reason;
drop index concurrently if exists webhook.deliveries_aside;
create index concurrently deliveries_aside on webhook.deliveries (last_seen_at) where aside is not null;
