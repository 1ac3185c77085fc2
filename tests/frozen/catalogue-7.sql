CREATE TABLE "_sqlite_migrations" (
   "id" INTEGER PRIMARY KEY,
   "migration_set" TEXT,
   "name" TEXT,
   "applied_at" TEXT
);
CREATE TABLE "commits" (
   "id" TEXT PRIMARY KEY,
   "parents" TEXT,
   "author" TEXT,
   "email" TEXT,
   "date" TEXT,
   "subject" TEXT,
   "message" TEXT,
   "trailers" TEXT
);
CREATE TABLE "recipes" (
   "id" TEXT PRIMARY KEY,
   "method" TEXT,
   "recipe" TEXT
);
CREATE TABLE "patches" (
   "id" TEXT PRIMARY KEY,
   "name" TEXT,
   "base" TEXT,
   "method" TEXT,
   "recipe" TEXT REFERENCES "recipes"("id"),
   "facts" INTEGER,
   "rank" INTEGER,
   "bytes" INTEGER,
   "header" TEXT
);
CREATE TABLE "changes" (
   "commit" TEXT REFERENCES "commits"("id"),
   "name" TEXT,
   "kind" TEXT,
   "patch" TEXT REFERENCES "patches"("id"),
   PRIMARY KEY ("commit", "name")
);
CREATE TABLE "facts" (
   "id" INTEGER PRIMARY KEY,
   "patch" TEXT REFERENCES "patches"("id"),
   "line" INTEGER,
   "subject" TEXT,
   "prompt" TEXT,
   "target" TEXT,
   "was" TEXT,
   "relation" TEXT,
   "record" TEXT
);
CREATE VIRTUAL TABLE "facts_fts" USING FTS5 (
    "subject", "prompt", "target",
    tokenize='unicode61 remove_diacritics 2',
    content="facts"
);
CREATE TABLE "layers" (
   "patch" TEXT REFERENCES "patches"("id"),
   "weight" TEXT,
   "d_out" INTEGER,
   "d_in" INTEGER,
   "form" TEXT,
   "rank" INTEGER,
   "norm" REAL,
   PRIMARY KEY ("patch", "weight")
);
CREATE TABLE "base_weights" (
   "base" TEXT,
   "weight" TEXT,
   "norm" REAL,
   PRIMARY KEY ("base", "weight")
);
CREATE TABLE "trees" (
   "id" TEXT,
   "base" TEXT,
   "digest" TEXT,
   PRIMARY KEY ("id", "base")
);
CREATE TABLE "members" (
   "tree" TEXT,
   "name" TEXT,
   "patch" TEXT REFERENCES "patches"("id"),
   "files" TEXT,
   PRIMARY KEY ("tree", "name")
);
CREATE TABLE "state" (
   "id" INTEGER PRIMARY KEY,
   "tree" TEXT,
   "commit" TEXT
);
CREATE TABLE "checked_tips" (
   "number" INTEGER PRIMARY KEY,
   "commit" TEXT
);
CREATE TABLE "violations" (
   "digest" TEXT PRIMARY KEY,
   "merge" TEXT,
   "violation" TEXT
);
CREATE TABLE "environments" (
   "id" TEXT PRIMARY KEY,
   "device" TEXT,
   "versions" TEXT
);
CREATE TABLE "results" (
   "id" INTEGER PRIMARY KEY,
   "patch" TEXT REFERENCES "patches"("id"),
   "date" TEXT,
   "environment" TEXT REFERENCES "environments"("id"),
   "line" INTEGER,
   "before" TEXT,
   "after" TEXT,
   "more" TEXT
);
CREATE TABLE "evaluations" (
   "id" INTEGER PRIMARY KEY,
   "patch" TEXT REFERENCES "patches"("id"),
   "date" TEXT,
   "environment" TEXT REFERENCES "environments"("id"),
   "tree" TEXT,
   "dataset" TEXT,
   "metrics" TEXT
);
CREATE TABLE "timings" (
   "id" INTEGER PRIMARY KEY,
   "patch" TEXT REFERENCES "patches"("id"),
   "date" TEXT,
   "environment" TEXT REFERENCES "environments"("id"),
   "phase" TEXT,
   "seconds" REAL
);
CREATE TABLE "builds" (
   "folder" TEXT PRIMARY KEY,
   "tree" TEXT,
   "base" TEXT,
   "date" TEXT,
   "record" TEXT
);
CREATE TABLE "fingerprints" (
   "folder" TEXT PRIMARY KEY,
   "files" TEXT,
   "fingerprint" TEXT
);
CREATE UNIQUE INDEX "idx__sqlite_migrations_migration_set_name"
    ON "_sqlite_migrations" ("migration_set", "name");
CREATE UNIQUE INDEX "idx_facts_patch_line"
    ON "facts" ("patch", "line");
CREATE UNIQUE INDEX "idx_checked_tips_commit"
    ON "checked_tips" ("commit");
CREATE INDEX "idx_results_patch_line"
    ON "results" ("patch", "line");
CREATE TRIGGER "facts_ai" AFTER INSERT ON "facts" BEGIN
  INSERT INTO "facts_fts" (rowid, "subject", "prompt", "target") VALUES (new.rowid, new."subject", new."prompt", new."target");
END;
CREATE TRIGGER "facts_ad" AFTER DELETE ON "facts" BEGIN
  INSERT INTO "facts_fts" ("facts_fts", rowid, "subject", "prompt", "target") VALUES('delete', old.rowid, old."subject", old."prompt", old."target");
END;
CREATE TRIGGER "facts_au" AFTER UPDATE ON "facts" BEGIN
  INSERT INTO "facts_fts" ("facts_fts", rowid, "subject", "prompt", "target") VALUES('delete', old.rowid, old."subject", old."prompt", old."target");
  INSERT INTO "facts_fts" (rowid, "subject", "prompt", "target") VALUES (new.rowid, new."subject", new."prompt", new."target");
END;
CREATE VIEW "facts_in_force" AS 
        select m.name as patch, f.line, f.subject, f.prompt, f.target, f.was, f.relation
        from facts f join members m on m.patch = f.patch join state s on s.tree = m.tree
        order by m.name, f.line;
CREATE VIEW "measured_facts" AS 
        select p.name as patch, f.line, f.subject, f.prompt, f.target, r.before, r.after, r.date,
               e.device, r.environment
        from results r join patches p on p.id = r.patch
        left join facts f on f.patch = r.patch and f.line = r.line
        left join environments e on e.id = r.environment
        order by r.date desc, p.name, r.line;
CREATE VIEW "log" AS 
        select c.date, c.author, c.subject,
               group_concat(case x.kind when 'added' then '+' when 'removed' then '-' else '~' end
                            || ' ' || x.name, ', ') as patches, c.id
        from commits c left join changes x on x."commit" = c.id group by c.id order by c.date desc;
CREATE VIEW "patches_in_force" AS 
    select m.name, c.date, c.author, p.facts, p.rank, round(sum(l.norm * l.norm), 6) as squared_norm,
           p.bytes, p.method, p.id as version
    from members m join state s on s.tree = m.tree join patches p on p.id = m.patch
    left join layers l on l.patch = p.id
    left join commits c on c.id = (
        select h.id from changes x join commits h on h.id = x."commit"
        where x.name = m.name and x.kind = 'added' order by h.parents like '% %', h.date desc limit 1)
    group by m.name order by c.date;
CREATE VIEW "layer_shares" AS 
    select p.name as patch, l.weight, l.form, l.rank, l.norm, b.norm as base_norm, l.norm / b.norm as share,
           exists (select 1 from members m join state s on s.tree = m.tree where m.patch = p.id) as in_force,
           p.id as version
    from layers l join patches p on p.id = l.patch
    left join base_weights b on b.base = p.base and b.weight = l.weight
    order by p.name, l.weight;
insert into "_sqlite_migrations" values (1, 'patchkit', 'm001_history', '2026-01-01 00:00:00+00:00');
insert into "_sqlite_migrations" values (2, 'patchkit', 'm002_beliefs', '2026-01-01 00:00:00+00:00');
insert into "_sqlite_migrations" values (3, 'patchkit', 'm003_measured', '2026-01-01 00:00:00+00:00');
insert into "_sqlite_migrations" values (4, 'patchkit', 'm004_views', '2026-01-01 00:00:00+00:00');
insert into "_sqlite_migrations" values (5, 'patchkit', 'm005_utc', '2026-01-01 00:00:00+00:00');
insert into "_sqlite_migrations" values (6, 'patchkit', 'm006_authors', '2026-01-01 00:00:00+00:00');
insert into "_sqlite_migrations" values (7, 'patchkit', 'm007_versions', '2026-01-01 00:00:00+00:00');
insert into "recipes" values ('r1', 'memit', '{"lambda":300.0}');
insert into "patches" values ('p1', 'ann-0123abcd', 'sha256:b', 'memit', 'r1', 1, 2, 100, '{}');
insert into "commits" values ('c1', '', 'Ada', 'a@example.org', '2026-01-01T00:00:00+00:00', 'Add', 'Add
', '[]');
insert into "changes" values ('c1', 'ann-0123abcd', 'added', 'p1');
insert into "facts" values (1, 'p1', 1, 'Ann', '{} lies in', 'Rome', null, null, '{"subject":"Ann"}');
insert into "layers" values ('p1', 'w', 4, 3, 'factors', 1, 0.5);
insert into "base_weights" values ('sha256:b', 'w', 2.0);
insert into "trees" values ('t1', 'sha256:b', 'd1');
insert into "members" values ('t1', 'ann-0123abcd', 'p1', '{}');
insert into "state" values (1, 't1', 'c1');
insert into "checked_tips" values (1, 'c1');
insert into "violations" values ('v1', 'c1', '{}');
insert into "environments" values ('e1', 'cpu', '{}');
insert into "results" values (1, 'p1', '2026-01-01', 'e1', 1, '{"p":0.1}', '{"p":0.9}', '{}');
insert into "evaluations" values (1, 'p1', '2026-01-01', 'e1', null, 'its own facts', '{"efficacy":1.0}');
insert into "timings" values (1, 'p1', '2026-01-01', 'e1', 'solve', 0.5);
insert into "builds" values ('out', 't1', 'sha256:b', '2026-01-01', '{}');
insert into "fingerprints" values ('base', '[]', 'sha256:b');
