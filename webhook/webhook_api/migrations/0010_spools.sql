-- How far each spool file has been drained, written in the transaction that drains it: a process that dies between this
-- commit and the deletion of the rows from its file repeats none of them, not even as a counted copy.

create table webhook.spools (
    id         uuid        not null,
    drained    bigint      not null,
    updated_at timestamptz not null default now(),
    constraint spools_pkey primary key (id),
    constraint spools_drained check (drained >= 0)
);

comment on table webhook.spools is 'Spool files of the API processes: up to which sequence number each is in the inbox';
