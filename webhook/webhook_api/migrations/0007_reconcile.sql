-- Requests that fal's queue is asked for: what is known of each, and what all workers share (pauses, pace, position).
-- The previous release works on this schema: it never looks here.

create table webhook.reconciliations (
    request_id    text        not null,
    reason        text        not null,
    training_type text,
    state         text        not null default 'waiting',
    tries         integer     not null default 0,
    failures      integer     not null default 0,
    found_at      timestamptz not null default now(),
    next_at       timestamptz not null default now(),
    asked_at      timestamptz,
    closed_at     timestamptz,
    result        text,
    detail        text,
    delivery_id   bigint,
    constraint reconciliations_pkey primary key (request_id),
    constraint reconciliations_reason check (reason in ('overdue', 'no_payload', 'asked')),
    constraint reconciliations_state check (state in ('waiting', 'delivered', 'settled', 'gone', 'unusable', 'given_up')),
    constraint reconciliations_closed check ((state = 'waiting') = (closed_at is null)),
    constraint reconciliations_counts check (tries >= 0 and failures >= 0)
);

comment on table webhook.reconciliations is 'Requests that fal''s queue is asked for, one row each';
comment on column webhook.reconciliations.reason is
    'overdue: its avatar trains for too long; no_payload: reported as OK without a result; asked: by an operator';
comment on column webhook.reconciliations.state is
    'delivered: became a delivery; settled: reported otherwise meanwhile; gone: fal does not know it (any more); unusable: '
    'its result is no JSON or too large; given_up: no end for too long';
comment on column webhook.reconciliations.tries is 'How often fal was asked';
comment on column webhook.reconciliations.failures is 'Answers in a row that said nothing about the request';

create index reconciliations_due on webhook.reconciliations (next_at) where state = 'waiting';
create index reconciliations_closed_at on webhook.reconciliations (closed_at) where state <> 'waiting';

create table webhook.reconcile_state (
    one             boolean     not null default true,
    scanned_id      bigint,
    horizon_id      bigint,
    horizon_at      timestamptz,
    next_request_at timestamptz not null default now(),
    paused_until    timestamptz,
    pause_reason    text,
    pauses          integer     not null default 0,
    run_at          timestamptz,
    constraint reconcile_state_pkey primary key (one),
    constraint reconcile_state_one check (one)
);

comment on table webhook.reconcile_state is 'One row: what all workers share';
comment on column webhook.reconcile_state.scanned_id is
    'Deliveries up to this id were looked through for results without a payload';
comment on column webhook.reconcile_state.horizon_id is
    'Highest id at horizon_at: ids are not committed in their order, so only what is below an old horizon is complete';
insert into webhook.reconcile_state default values;
