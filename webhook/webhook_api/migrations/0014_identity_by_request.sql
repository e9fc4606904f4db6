-- The identity of an event, found by its request. The constraint keeps its name, which is all that the previous release
-- knows of it.

alter table webhook.deliveries
    drop constraint deliveries_identity,
    add constraint deliveries_identity unique using index deliveries_event;
drop index webhook.deliveries_request;
