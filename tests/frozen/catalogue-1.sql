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
CREATE UNIQUE INDEX "idx__sqlite_migrations_migration_set_name"
    ON "_sqlite_migrations" ("migration_set", "name");
CREATE UNIQUE INDEX "idx_facts_patch_line"
    ON "facts" ("patch", "line");
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
insert into "_sqlite_migrations" values (1, 'patchkit', 'm001_history', '2026-01-01 00:00:00+00:00');
insert into "recipes" values ('r1', 'memit', '{"lambda":300.0}');
insert into "patches" values ('p1', 'ann-0123abcd', 'sha256:b', 'memit', 'r1', 1, 2, 100, '{}');
insert into "commits" values ('c1', '', 'Ada', 'a@example.org', '2026-01-01T00:00:00+00:00', 'Add', 'Add
', '[]');
insert into "changes" values ('c1', 'ann-0123abcd', 'added', 'p1');
insert into "facts" values (1, 'p1', 1, 'Ann', '{} lies in', 'Rome', null, null, '{"subject":"Ann"}');
insert into "layers" values ('p1', 'w', 4, 3, 'factors', 1, 0.5);
insert into "base_weights" values ('sha256:b', 'w', 2.0);
