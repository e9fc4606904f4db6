-- What the worker needs beyond the inbox: deliveries that take their worker down with them are counted apart from
-- those that merely failed, and the unfinished deliveries of one request are found without reading the finished ones.

alter table webhook.deliveries add column crashes integer not null default 0;
alter table webhook.deliveries add constraint deliveries_crashes check (crashes >= 0);

comment on column webhook.deliveries.crashes is 'How often a lease ran out: the worker died or hung in the middle';

create index deliveries_unfinished on webhook.deliveries (request_id, id) where state in ('pending', 'leased', 'retry');
