-- outside a transaction
-- "What came in the last hour?": a range index of some kilobytes, which costs the intake nothing. Rows stand about where
-- time has put them, also after years of updates and pruning. An index that a killed run has left invalid is taken away.
drop index concurrently if exists webhook.deliveries_first_seen;
create index concurrently deliveries_first_seen on webhook.deliveries
    using brin (first_seen_at) with (pages_per_range = 32, autosummarize = on);
