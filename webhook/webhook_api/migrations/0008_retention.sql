-- What of a finished delivery has been cleared away, and a table that is vacuumed by its work and not by its size.
-- The previous release works on this schema: it never names the new column.

alter table webhook.deliveries add column pruned smallint not null default 0;
comment on column webhook.deliveries.pruned is
    '0: whole; 1: body and headers are in the archive only; 2: its effects are gone as well, the identity is left';
alter table webhook.deliveries add constraint deliveries_pruned
    check (pruned between 0 and 2) not valid;

-- 20 % of ten million rows is two million dead ones in front of every worker's index scan.
alter table webhook.deliveries set (
    autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.02);
alter table webhook.effects set (
    autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.02);

-- Records of deeds may go when they are old, by the retention alone and never within 30 days.
create or replace function webhook.refuse_audit_change() returns trigger
    language plpgsql as
$$
begin
    if tg_op = 'DELETE' and current_setting('webhook.retention', true) = 'on' and old.at < now() - interval '30 days' then
        return old;
    end if;
    raise exception 'webhook.audit is append-only' using errcode = 'insufficient_privilege';
end
$$;
