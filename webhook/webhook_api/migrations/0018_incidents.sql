-- What a person has to look at, and who was told of it: the notices of the workers (docs/monitoring.md).
-- The previous release works on this schema: it never looks here.

create table webhook.incidents (
    id             bigint           generated always as identity,
    kind           text             not null,
    opened_at      timestamptz      not null default now(),
    last_seen_at   timestamptz      not null default now(),
    closed_at      timestamptz,
    deliveries     bigint           not null,
    oldest_seconds double precision not null,
    told           jsonb            not null default '{}',
    constraint incidents_pkey primary key (id),
    constraint incidents_kind check (kind in ('dead_letters', 'stuck')),
    constraint incidents_times check (last_seen_at >= opened_at and closed_at >= last_seen_at),
    constraint incidents_told check (jsonb_typeof(told) = 'object')
);

comment on table webhook.incidents is 'Dead letters and stuck deliveries: one row from when they appear until they are gone';
comment on column webhook.incidents.deliveries is 'How many they were when it was opened; the gauges stop counting at 10,000';
comment on column webhook.incidents.told is 'By channel (webhook, telegram), the last notice that arrived there: opened or closed';

-- However many workers look: one of a kind at a time.
create unique index incidents_open on webhook.incidents (kind) where closed_at is null;
create index incidents_closed on webhook.incidents (closed_at);
