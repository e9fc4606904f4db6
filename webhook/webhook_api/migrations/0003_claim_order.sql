-- What has never been tried and what is tried again are claimed apart, so that a crowd of parked or failing deliveries
-- cannot keep a new one waiting. One index for each question takes the place of the one for both.

create index deliveries_pending on webhook.deliveries (next_attempt_at) where state = 'pending';
create index deliveries_again on webhook.deliveries (next_attempt_at) where state in ('retry', 'parked');
drop index webhook.deliveries_due;
