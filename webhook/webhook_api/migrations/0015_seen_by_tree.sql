-- outside a transaction
-- A B-tree for times in the place of the range index. At ten million rows, vacuumed after pruning, new rows stand all over
-- the table: the last half hour was 30,000 rows, and the range index read 560,000 for it (bench/table).
drop index concurrently if exists webhook.deliveries_seen;
create index concurrently deliveries_seen on webhook.deliveries (first_seen_at);
drop index concurrently if exists webhook.deliveries_first_seen;
