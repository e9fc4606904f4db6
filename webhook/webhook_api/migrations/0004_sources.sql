-- Senders are configured, deliveries can be kept aside, and refused ones leave a bounded trace.
-- The previous release works on this schema: it writes 'fal' and 'manual' only and never names the new column.

alter table webhook.deliveries add column aside text;
comment on column webhook.deliveries.aside is
    'Why an authentic delivery is kept and not processed: stale, future, account, malformed; null: it is processed';

-- Not valid: a big table is not read under this lock. 0005 reads it under one that stops nobody.
alter table webhook.deliveries drop constraint deliveries_source;
alter table webhook.deliveries add constraint deliveries_source
    check (source ~ '^[a-z][a-z0-9_-]{0,31}$') not valid;
alter table webhook.deliveries add constraint deliveries_aside_reason
    check (aside is null or aside ~ '^[a-z][a-z_]{0,31}$') not valid;

-- Refused deliveries, for another look. The slots are the bound: at most 512 of a reason, the oldest is overwritten.
create table webhook.samples (
    reason      text        not null,
    slot        integer     not null,
    source      text        not null,
    seen_at     timestamptz not null default now(),
    instance    text        not null,
    detail      text        not null,
    headers     jsonb       not null default '{}'::jsonb,
    body        bytea       not null,
    body_bytes  bigint      not null,
    body_sha256 text        not null,
    constraint samples_pkey primary key (reason, slot),
    constraint samples_reason check (reason in ('bad_signature', 'account_not_allowed')),
    constraint samples_slot check (slot between 0 and 511),
    constraint samples_body check (octet_length(body) <= 65536),
    constraint samples_headers check (octet_length(headers::text) <= 16384),
    constraint samples_sha256 check (body_sha256 ~ '^[0-9a-f]{64}$')
);

comment on table webhook.samples is 'Refused deliveries kept for another look; bounded by its slots';
comment on column webhook.samples.body is 'The first 64 KiB; body_bytes and body_sha256 speak of the whole';
