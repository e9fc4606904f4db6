-- What operators do to deliveries from the command line, and who did it.
-- The previous release works on this schema: it never names the new columns, and leaves dead rows alone.

alter table webhook.deliveries add column discarded_at timestamptz;
alter table webhook.deliveries add column replayed_at timestamptz;

comment on column webhook.deliveries.discarded_at is
    'When an operator closed it: kept, but no dead letter any more; null for all others';
comment on column webhook.deliveries.replayed_at is
    'When an operator had it tried again: its patience counts from here instead of first_seen_at';

-- Not valid: a big table is not read under this lock. No row that stands can break it, the column being new.
alter table webhook.deliveries add constraint deliveries_discarded
    check (discarded_at is null or state = 'dead') not valid;

create table webhook.audit (
    id           bigint generated always as identity,
    at           timestamptz not null default now(),
    operation    uuid        not null,
    who          text        not null,
    instance     text        not null,
    action       text        not null,
    filter       jsonb       not null default '{}'::jsonb,
    affected     integer     not null,
    delivery_ids bigint[]    not null default '{}',
    detail       jsonb       not null default '{}'::jsonb,
    constraint audit_pkey primary key (id),
    constraint audit_action check (action ~ '^[a-z][a-z_.-]{0,63}$'),
    constraint audit_who check (length(who) between 1 and 200),
    constraint audit_affected check (affected >= 0)
);

comment on table webhook.audit is
    'What operators changed, written in the transaction of the change; ids stay when the deliveries are pruned';
comment on column webhook.audit.operation is 'One command; a big one takes several transactions, one row each';

-- A record of deeds is not corrected afterwards.
create function webhook.refuse_audit_change() returns trigger
    language plpgsql as
$$
begin
    raise exception 'webhook.audit is append-only' using errcode = 'insufficient_privilege';
end
$$;

create trigger audit_append_only before update or delete on webhook.audit
    for each row execute function webhook.refuse_audit_change();
