-- outside a transaction
-- What the console's pages ask of ten million rows (bench/console). A delivery that ends well is in none of these: its
-- status is completed, its source fal, and it was never dead. An index that a killed run has left invalid is taken away
-- first.

-- Failed trainings of a day, and what another sender has brought in it, in the order of arrival.
drop index concurrently if exists webhook.deliveries_status_seen;
create index concurrently deliveries_status_seen on webhook.deliveries (status, first_seen_at, id)
    where status <> 'completed';
drop index concurrently if exists webhook.deliveries_source_seen;
create index concurrently deliveries_source_seen on webhook.deliveries (source, first_seen_at, id) where source <> 'fal';
-- Dead letters, and all that is dead, in the order of their pages: each stands on a page of the table for itself, so what
-- is not shown must not be read. `id + 0`, because the planner might follow the primary key for `id`.
drop index concurrently if exists webhook.deliveries_letters;
create index concurrently deliveries_letters on webhook.deliveries ((id + 0))
    where state = 'dead' and discarded_at is null;
drop index concurrently if exists webhook.deliveries_dead_rows;
create index concurrently deliveries_dead_rows on webhook.deliveries ((id + 0)) where state = 'dead';
-- What was done to one delivery. The table is written by operators alone.
drop index concurrently if exists webhook.audit_deliveries;
create index concurrently audit_deliveries on webhook.audit using gin (delivery_ids);
