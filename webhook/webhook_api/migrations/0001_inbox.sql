-- The inbox: one row a delivery, committed before the sender gets its answer, and what became of it.

create table webhook.deliveries (
    id                 bigint generated always as identity,
    source             text        not null,
    request_id         text        not null,
    dedup_key          text        not null,
    status             text        not null,
    gateway_request_id text,
    training_type_hint text,
    account_id         text,
    body               bytea       not null,
    body_sha256        text        not null,
    headers            jsonb       not null default '{}'::jsonb,
    edge_request_id    text,
    probe              boolean     not null default false,
    attempts           integer     not null default 1,
    first_seen_at      timestamptz not null default now(),
    last_seen_at       timestamptz not null default now(),
    state              text        not null default 'pending',
    tries              integer     not null default 0,
    next_attempt_at    timestamptz not null default now(),
    lease_owner        text,
    lease_until        timestamptz,
    last_error         text,
    done_at            timestamptz,
    constraint deliveries_pkey primary key (id),
    -- The same event arrives more than once; this is what makes it one.
    constraint deliveries_identity unique (source, request_id, dedup_key),
    constraint deliveries_source check (source in ('fal', 'manual')),
    constraint deliveries_status check (
        status in ('queued', 'in_progress', 'completed', 'failed', 'cancelled', 'unknown')),
    constraint deliveries_state check (state in ('pending', 'leased', 'retry', 'parked', 'done', 'dead')),
    constraint deliveries_sha256 check (body_sha256 ~ '^[0-9a-f]{64}$'),
    constraint deliveries_counts check (attempts >= 1 and tries >= 0),
    constraint deliveries_lease check ((state = 'leased') = (lease_owner is not null and lease_until is not null)),
    constraint deliveries_done check (state <> 'done' or done_at is not null)
);

comment on table webhook.deliveries is 'Inbox: raw deliveries and the state of their processing';
comment on column webhook.deliveries.attempts is 'How often the delivery arrived';
comment on column webhook.deliveries.tries is 'How often a worker tried to process it';

-- The work that is due, and the leases that may have run out: the two questions a worker asks.
create index deliveries_due on webhook.deliveries (next_attempt_at) where state in ('pending', 'retry', 'parked');
create index deliveries_leases on webhook.deliveries (lease_until) where state = 'leased';
create index deliveries_dead on webhook.deliveries (last_seen_at) where state = 'dead';
create index deliveries_request on webhook.deliveries (request_id);

create table webhook.delivery_variants (
    delivery_id bigint      not null,
    body_sha256 text        not null,
    body        bytea       not null,
    headers     jsonb       not null default '{}'::jsonb,
    seen_at     timestamptz not null default now(),
    constraint delivery_variants_pkey primary key (delivery_id, body_sha256),
    constraint delivery_variants_delivery foreign key (delivery_id)
        references webhook.deliveries (id) on delete cascade
);

comment on table webhook.delivery_variants is 'Other bodies that arrived under the identity of a delivery';

create table webhook.effects (
    delivery_id bigint      not null,
    name        text        not null,
    state       text        not null,
    tries       integer     not null default 0,
    detail      jsonb       not null default '{}'::jsonb,
    last_error  text,
    updated_at  timestamptz not null default now(),
    constraint effects_pkey primary key (delivery_id, name),
    constraint effects_state check (state in ('done', 'failed', 'skipped')),
    constraint effects_delivery foreign key (delivery_id) references webhook.deliveries (id) on delete cascade
);

comment on table webhook.effects is 'What was done for a delivery, one row an effect';

-- Wakes the worker at commit. A statement trigger: a batch of rows is one notification.
create function webhook.notify_deliveries() returns trigger
    language plpgsql as
$$
begin
    perform pg_notify('webhook_deliveries', '');
    return null;
end
$$;

create trigger deliveries_notify after insert on webhook.deliveries
    for each statement execute function webhook.notify_deliveries();
