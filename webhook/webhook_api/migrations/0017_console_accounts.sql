-- Who may use the console and its API, and the counts that its charts are drawn from.
-- The previous release works on this schema: it never looks here.

create table webhook.accounts (
    name        text        not null,
    role        text        not null,
    password    text        not null,
    created_at  timestamptz not null default now(),
    password_at timestamptz not null default now(),
    disabled_at timestamptz,
    constraint accounts_pkey primary key (name),
    constraint accounts_name check (name ~ '^[a-z0-9][a-z0-9._-]{0,63}$'),
    constraint accounts_role check (role in ('viewer', 'operator')),
    constraint accounts_password check (password like '$argon2id$%')
);

comment on table webhook.accounts is 'People who may use the console; passwords are argon2id hashes';

create table webhook.sessions (
    token_sha256 bytea       not null,
    account      text        not null,
    created_at   timestamptz not null default now(),
    seen_at      timestamptz not null default now(),
    address      text        not null default '',
    constraint sessions_pkey primary key (token_sha256),
    constraint sessions_token check (octet_length(token_sha256) = 32),
    constraint sessions_account foreign key (account) references webhook.accounts (name) on delete cascade
);

comment on table webhook.sessions is 'Logins that are open, by the digest of a random token that only the browser has';
create index sessions_of_account on webhook.sessions (account);
create index sessions_seen on webhook.sessions (seen_at);

create table webhook.api_tokens (
    id           bigint generated always as identity,
    name         text        not null,
    role         text        not null,
    token_sha256 bytea       not null,
    created_at   timestamptz not null default now(),
    created_by   text        not null,
    revoked_at   timestamptz,
    constraint api_tokens_pkey primary key (id),
    constraint api_tokens_secret unique (token_sha256),
    constraint api_tokens_name check (name ~ '^[a-z0-9][a-z0-9._-]{0,63}$'),
    constraint api_tokens_role check (role in ('viewer', 'operator')),
    constraint api_tokens_token check (octet_length(token_sha256) = 32)
);

comment on table webhook.api_tokens is 'Programs that may use the console''s API, by the digest of their token';
create unique index api_tokens_in_use on webhook.api_tokens (name) where revoked_at is null;

create table webhook.rollups (
    starts_at   timestamptz not null,
    deliveries  integer     not null,
    failed      integer     not null,
    done        integer     not null,
    dead        integer     not null,
    latency_p50 real,
    latency_p95 real,
    counted_at  timestamptz not null default now(),
    constraint rollups_pkey primary key (starts_at),
    constraint rollups_counts check (deliveries >= 0 and failed >= 0 and done >= 0 and dead >= 0)
);

comment on table webhook.rollups is 'Deliveries of each five minutes, counted by a worker while they are recent';
comment on column webhook.rollups.failed is 'Deliveries that report a failed training';
comment on column webhook.rollups.latency_p50 is 'Seconds from arrival to the last effect';
