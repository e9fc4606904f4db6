-- Roles, database, passwords and the bot's tables, as the service expects them. Run at every start by the entrypoint:
-- every statement may be repeated, on a new cluster and on one that has lived for years.
-- Passwords are read from files by psql itself; they are in no argument and, at this log level, in no log.

\getenv secrets SECRETS_DIR
\set postgres_password `cat "$SECRETS_DIR/postgres_password"`
\set bot_password `cat "$SECRETS_DIR/postgres_bot_password"`
\set webhook_password `cat "$SECRETS_DIR/postgres_webhook_password"`

SELECT format('CREATE ROLE %I', name)
  FROM unnest(ARRAY['aisha', 'aisha_webhook']) AS name
 WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec

ALTER ROLE postgres PASSWORD :'postgres_password';
ALTER ROLE aisha LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION PASSWORD :'bot_password';
ALTER ROLE aisha_webhook LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION PASSWORD :'webhook_password';

SELECT 'CREATE DATABASE aisha OWNER aisha'
 WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'aisha') \gexec

REVOKE ALL ON DATABASE postgres, template1 FROM PUBLIC;
REVOKE ALL ON DATABASE aisha FROM PUBLIC;
GRANT CONNECT ON DATABASE aisha TO aisha;
-- The schema `webhook` below is its own; it makes nothing else.
REVOKE CREATE, TEMPORARY ON DATABASE aisha FROM aisha_webhook;
GRANT CONNECT ON DATABASE aisha TO aisha_webhook;

\connect aisha

CREATE EXTENSION IF NOT EXISTS pg_stat_statements;

-- The bot owns its tables. Where the bot has made them already, they stay as they are.
SET ROLE aisha;

CREATE TABLE IF NOT EXISTS public.users (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    telegram_id bigint NOT NULL CONSTRAINT users_telegram_id_key UNIQUE
);

CREATE TABLE IF NOT EXISTS public.avatars (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL CONSTRAINT avatars_user_id_fkey REFERENCES public.users (id) ON DELETE CASCADE,
    name varchar(100),
    training_type varchar(20) NOT NULL DEFAULT 'portrait',
    status varchar(32) NOT NULL DEFAULT 'draft',
    fal_request_id varchar(255),
    finetune_id varchar(255),
    training_progress integer NOT NULL DEFAULT 0
        CONSTRAINT avatars_training_progress_check CHECK (training_progress BETWEEN 0 AND 100),
    training_started_at timestamptz,
    training_completed_at timestamptz,
    diffusers_lora_file_url varchar(500),
    config_file_url varchar(500),
    training_error text,
    fal_response_data json,
    last_status_check timestamptz,
    updated_at timestamptz NOT NULL DEFAULT now(),
    trigger_word varchar(50),
    trigger_phrase varchar(100)
);
CREATE INDEX IF NOT EXISTS avatars_fal_request_id_idx ON public.avatars (fal_request_id);
-- What is in training, for the console's page: a handful, whatever the table holds. An enum is compared by its own label.
-- The table is the bot's: where it is made in yet another way, nothing must fail for this.
DO $$
DECLARE
    label text := (SELECT min(enumlabel::text) FROM pg_enum e JOIN pg_attribute a ON a.atttypid = e.enumtypid
                   WHERE a.attrelid = 'public.avatars'::regclass AND a.attname = 'status' AND lower(enumlabel) = 'training');
BEGIN
    -- Earlier versions made it of a text column with a condition that nothing meets.
    IF EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass('public.avatars_training_idx')
               AND pg_get_expr(indpred, indrelid) LIKE '%NULL%') THEN
        DROP INDEX public.avatars_training_idx;
    END IF;
    EXECUTE 'CREATE INDEX IF NOT EXISTS avatars_training_idx ON public.avatars (status) WHERE '
        || CASE WHEN label IS NULL THEN 'lower(status::text) = ''training''' ELSE format('status = %L', label) END;
EXCEPTION WHEN OTHERS THEN
    RAISE WARNING 'public.avatars gets no index on what is in training: %', SQLERRM;
END
$$;

GRANT USAGE ON SCHEMA public TO aisha_webhook;
-- What a report of fal changes, and no more: not whose avatar it is, nor its name or trigger.
REVOKE ALL ON public.users, public.avatars FROM aisha_webhook;
GRANT SELECT ON public.avatars TO aisha_webhook;
GRANT UPDATE (status, training_progress, training_started_at, training_completed_at, training_error, finetune_id,
    diffusers_lora_file_url, config_file_url, fal_response_data, last_status_check, updated_at)
    ON public.avatars TO aisha_webhook;

RESET ROLE;
CREATE SCHEMA IF NOT EXISTS webhook AUTHORIZATION aisha_webhook;
