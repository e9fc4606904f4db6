-- What was deployed where, when and by whom: brought here from the hosts' deployments.jsonl by `webhook-api deployments import`.
-- The previous release works on this schema: it never looks here.

create table webhook.deployments (
    id           text        not null,
    host         text        not null,
    kind         text        not null,
    started_at   timestamptz not null,
    ended_at     timestamptz,
    who          text        not null default '',
    from_release text,
    to_release   text,
    result       text        not null,
    record       jsonb       not null,
    imported_at  timestamptz not null default now(),
    constraint deployments_pkey primary key (id, host),
    constraint deployments_kind check (kind in ('deploy', 'rollback', 'restore')),
    constraint deployments_result check (result in ('done', 'unchanged', 'failed', 'rolled_back', 'interrupted')),
    constraint deployments_times check (ended_at >= started_at),
    constraint deployments_record check (jsonb_typeof(record) = 'object')
);

comment on table webhook.deployments is 'Runs of site.yml, rollback and restore, one row a run and host';
comment on column webhook.deployments.record is 'The whole record, as the host has it';

create index deployments_started on webhook.deployments (started_at, id, host);
