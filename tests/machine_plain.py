"""The machine's rules for plain Git commands: Git merges folders, and patchkit says what may be believed."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import strategies as st
from machine_commands import PLACES, SMALL, pick
from machine_model import State, doubled, held, merge_facts, merge_folders, same_state
from machine_world import Clone, World, commits_back, step


class Plain(World):
    """revert, merge, cherry-pick, rebase, reset, checkout, rm, commit --amend, stash, clean, tag, branch."""

    def outcome(self, clone: Clone, worked: bool, expected: State | None, abort: str) -> None:
        """After a command that Git may have stopped at: the expected folders, believed or named."""
        if not worked:
            said = clone.said
            clone.tries(abort, "--abort")
            self.note(f"git {abort}: stopped")
            assert expected is None or same_state(expected, self.state_at(clone, clone.head)), said
            return self.unchanged(clone)
        assert expected is not None, clone.said
        before = clone.head
        self.learn(clone, expected, own=False)
        if clone.head != before and not self.believed(clone, expected):
            self.note(f"git {abort}: named")
            assert clone.repository().status().problems
            assert clone.run("build").code == 65
            clone.git("reset", "-q", "--hard", before)
            self.learn(clone, self.state_at(clone, before), own=False)
        return None

    def guarded(self, clone: Clone, *words: str) -> bool:
        """A command that merges folders, without guesses; before, where Git may guess a rename, with them.

        What comes of a guess is believed for what it is, or named; then it is taken back.
        """
        if not self.renames:
            return self.plain(clone, *words)
        self.note(f"git {words[0]}: with guesses")
        before = clone.head
        if not clone.tries(*words):
            if not clone.tries(words[0], "--abort"):
                clone.git("reset", "-q", "--merge")  # a squash has nothing to abort
        elif clone.read_refs().head != before:
            self.moved(clone, own=False)
            if clone.repository().status().problems:
                assert clone.run("build").code == 65
            else:
                state = self.state_at(clone, clone.head)
                self.check_in_force(clone, state)
                assert self.believed(clone, state)
        clone.git("reset", "-q", "--hard", before)
        self.moved(clone, own=False)
        verb, *rest = words
        # Git before 2.50 guesses whatever merge.renames says, but for its older strategy.
        without = ("-c", "merge.renames=false")
        return self.plain(clone, verb, "--strategy=recursive", *rest, config=without)

    def merged(self, base: State, ours: State, theirs: State) -> State | None:
        """By folders; and whether Git may take one that went for one that came, a rename."""
        for side in (ours, theirs):
            self.renames |= bool(base.keys() - side.keys() and side.keys() - base.keys())
        return merge_folders(base, ours, theirs)

    @step(where=PLACES, back=st.integers(0, 3))
    def git_revert(self, where: int, back: int) -> None:
        clone, state = self.at(where)
        *_, commit = commits_back(clone, back + 1)
        parents = clone.parents(commit)
        if len(parents) == 1 and not same_state(
            left := self.state_at(clone, commit), self.state_at(clone, parents[0])
        ):
            expected = self.merged(left, state, self.state_at(clone, parents[0]))
            worked = self.guarded(clone, "revert", "--no-edit", commit)
            self.outcome(clone, worked, expected, "revert")

    @step(where=PLACES, which=SMALL, squash=st.booleans())
    def git_merge(self, where: int, which: int, squash: bool) -> None:
        clone, state = self.at(where)
        branches = sorted(set(clone.refs.branches) - {str(clone.refs.branch)})
        if not branches:
            return
        branch = branches[which % len(branches)]
        other = clone.refs.branches[branch]
        bases = clone.bases(clone.head, other)
        if len(bases) != 1 or other in bases or (squash and clone.head in bases):
            return
        expected = self.merged(self.state_at(clone, bases[0]), state, self.state_at(clone, other))
        if squash:
            worked = self.guarded(clone, "merge", "-q", "--squash", branch)
            if not clone.tries("commit", "-q", "-m", f"Squash {branch}"):
                clone.git("reset", "-q", "--hard")
                worked = False
        else:
            worked = self.guarded(clone, "merge", "-q", "--no-edit", branch)
        self.outcome(clone, worked, expected, "merge")

    @step(where=PLACES, which=SMALL)
    def git_cherry_pick(self, where: int, which: int) -> None:
        clone, state = self.at(where)
        branches = sorted(set(clone.refs.branches) - {str(clone.refs.branch)})
        if not branches:
            return
        commit = clone.refs.branches[branches[which % len(branches)]]
        parents = clone.parents(commit)
        if len(parents) == 1:
            expected = self.merged(self.state_at(clone, parents[0]), state, self.state_at(clone, commit))
            self.outcome(clone, self.guarded(clone, "cherry-pick", commit), expected, "cherry-pick")

    @step(where=PLACES, which=SMALL)
    def git_rebase(self, where: int, which: int) -> None:
        clone, _ = self.at(where)
        branches = sorted(set(clone.refs.branches) - {str(clone.refs.branch)})
        if not branches or clone.refs.branch is None:
            return
        onto = clone.refs.branches[branches[which % len(branches)]]
        if clone.is_ancestor(onto, clone.head):
            return
        expected = self._rebased(clone, onto)
        worked = self.guarded(clone, "rebase", "-q", onto)
        self.outcome(clone, worked, expected, "rebase")

    def _rebased(self, clone: Clone, onto: str) -> State | None:
        """Each commit that is not there yet, in order, merges left out."""
        state: State | None = self.state_at(clone, onto)
        lines = ("--reverse", "--topo-order", "--no-merges", "--right-only", "--cherry-pick")
        for commit in clone.revisions(*lines, f"{onto}...{clone.head}"):
            (parent,) = clone.parents(commit)
            if state is not None:
                state = self.merged(self.state_at(clone, parent), state, self.state_at(clone, commit))
        return state

    @step(where=PLACES, back=st.integers(1, 3))
    def git_reset(self, where: int, back: int) -> None:
        clone, _ = self.at(where)
        *_, commit = commits_back(clone, back + 1)
        if commit != clone.head:
            assert self.plain(clone, "reset", "-q", "--hard", commit)
            self.learn(clone, self.state_at(clone, commit), own=False)

    @step(where=PLACES, back=st.integers(0, 2), which=SMALL)
    def git_checkout(self, where: int, back: int, which: int) -> None:
        """To an older commit, on no branch, or to a branch."""
        clone, _ = self.at(where)
        *_, commit = commits_back(clone, back + 1)
        assert self.plain(clone, "checkout", "-q", "--detach", commit)
        self.learn(clone, self.state_at(clone, commit), own=False)
        self.check_in_force(clone, self.state_at(clone, commit))
        names = sorted(clone.refs.branches)
        name = names[which % len(names)]
        assert self.plain(clone, "checkout", "-q", name)
        self.learn(clone, self.state_at(clone, clone.refs.branches[name]), own=False)

    @step(where=PLACES, which=SMALL, back=st.integers(1, 4))
    def git_checkout_of_a_folder(self, where: int, which: int, back: int) -> None:
        """A version of a patch from an older commit, put back by its name."""
        clone, state = self.at(where)
        *_, commit = commits_back(clone, back + 1)
        older = self.state_at(clone, commit)
        for name in pick(older, which):
            if name not in state or state[name].id != older[name].id:
                after = {**state, name: older[name]}
                worked = self.plain(clone, "checkout", commit, "--", f"patches/{name}")
                assert worked
                clone.git("commit", "-q", "-m", f"{name} as it was")
                self.outcome(clone, True, after, "checkout")

    @step(where=PLACES, which=SMALL)
    def git_rm(self, where: int, which: int) -> None:
        clone, state = self.at(where)
        for name in pick(state, which):
            assert self.plain(clone, "rm", "-q", "-r", f"patches/{name}")
            clone.git("commit", "-q", "-m", f"{name} away")
            self.learn(clone, {n: v for n, v in state.items() if n != name}, own=False)

    @step(where=PLACES, keep=st.booleans())
    def git_amend(self, where: int, keep: bool) -> None:
        """Reworded, with its trailers or without: it may have to be named then."""
        clone, state = self.at(where)
        if len(clone.parents(clone.head)) == 1:
            text = ["--no-edit", "--reset-author"] if keep else ["-m", f"Reworded {self.turn}"]
            worked = self.plain(clone, "commit", "-q", "--amend", *text)
            self.outcome(clone, worked, state, "commit")

    @step(where=PLACES, which=SMALL)
    def git_stash_and_clean(self, where: int, which: int) -> None:
        """What is not committed is named and not in force; stashed, cleaned away, it is gone."""
        clone, state = self.at(where)
        (stray := clone.root / "patches" / "stray").mkdir(parents=True)
        (stray / "facts.jsonl").write_text("x\n")
        for name in pick(state, which):
            (clone.root / "patches" / name / "facts.jsonl").write_text("mine\n")
        status = clone.repository().status()
        assert len(status.leftovers) == 1 + bool(state)
        assert status.patches == len(state)
        if state:
            assert self.plain(clone, "stash", "-q")
            clone.git("stash", "drop", "-q")
        assert self.plain(clone, "clean", "-q", "-x", "-d", "-f")
        self.unchanged(clone)

    @step(where=PLACES, kind=st.sampled_from(["tag", "branch"]))
    def git_tag_or_branch(self, where: int, kind: str) -> None:
        clone, state = self.at(where)
        if kind == "tag":
            assert self.plain(clone, "tag", "-a", "-m", "One", f"tag{self.turn}")
        elif len(clone.refs.branches) < 5:
            assert self.plain(clone, "branch", f"side{self.turn}")
        else:
            gone = max(set(clone.refs.branches) - {str(clone.refs.branch), "main"})
            assert self.plain(clone, "branch", "-q", "-D", gone)
            del clone.moves[gone]
        self.learn(clone, state, own=False)

    # -- what may be believed -------------------------------------------------------------------

    def believed(self, clone: Clone, state: State) -> bool:
        """Each fact once, a new merge the merge of its facts, and nothing back that was taken out."""
        return not (doubled(state) or self._merged_wrong(clone, state) or any(self._back(clone, state)))

    def _merged_wrong(self, clone: Clone, state: State) -> bool:
        """Of the commit at HEAD; those before it were believed."""
        parents = clone.parents(clone.head)
        if len(parents) != 2:
            return False
        bases = clone.bases(*parents)
        before = [self.state_at(clone, base) for base in bases]
        ours, theirs = (self.state_at(clone, parent) for parent in parents)
        said = held(state)
        for subject, may in merge_facts(before, ours, theirs).items():
            if said.get(subject, (None, None))[1] not in may:
                return True
        return bool(self.removed_since(clone, parents[0], bases) & (state.keys() - ours.keys()))

    def _back(self, clone: Clone, state: State) -> Iterator[str]:
        """Facts that a commit of one parent took out, and one that was on nobody's purpose brought back
        in another folder."""
        plain = [(c, p[0]) for c in clone.revisions(clone.head) if len(p := clone.parents(c)) == 1]
        steps = [(c, held(self.state_at(clone, p)), held(self.state_at(clone, c))) for c, p in plain]
        taken = [(c, s, before[s][0]) for c, before, after in steps for s in before.keys() - after.keys()]
        for commit, before, after in steps:
            message = clone.git("log", "-1", "--format=%B", commit)
            if "\nPatchkit-" in message or "This reverts commit" in message:
                continue
            for subject in after.keys() - before.keys():
                folder, fact = after[subject]
                removals = [c for c, s, f in taken if s == subject and f != folder]
                lasts = held(state).get(subject, ("", None))[1] == fact
                if lasts and any(clone.is_ancestor(removal, commit) for removal in removals):
                    yield subject
