-- What our schema holds goes, also what a newer version has put there; the schema itself stays, because our role may not make one in a database of
-- others. Nothing outside of it is dropped with it: who depends on it keeps the restore from beginning. In the transaction of the restore.
DO $$
DECLARE
  kind text[];
  doomed text;
BEGIN
  IF to_regnamespace('webhook') IS NULL THEN
    CREATE SCHEMA webhook;
  END IF;
  FOREACH kind SLICE 1 IN ARRAY ARRAY[['VIEW', 'v'], ['MATERIALIZED VIEW', 'm'], ['TABLE', 'rp'], ['SEQUENCE', 'S']] LOOP
    SELECT string_agg(format('webhook.%I', relname), ', ') INTO doomed
    FROM pg_class WHERE relnamespace = 'webhook'::regnamespace AND position(relkind::text IN kind[2]) > 0;
    IF doomed IS NOT NULL THEN
      EXECUTE format('DROP %s %s', kind[1], doomed);
    END IF;
  END LOOP;
  SELECT string_agg(oid::regprocedure::text, ', ') INTO doomed FROM pg_proc WHERE pronamespace = 'webhook'::regnamespace;
  IF doomed IS NOT NULL THEN
    EXECUTE format('DROP ROUTINE %s', doomed);
  END IF;
  SELECT string_agg(format('webhook.%I', typname), ', ') INTO doomed
  FROM pg_type WHERE typnamespace = 'webhook'::regnamespace AND typtype IN ('e', 'd');
  IF doomed IS NOT NULL THEN
    EXECUTE format('DROP TYPE %s', doomed);
  END IF;
END
$$;
