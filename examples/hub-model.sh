#!/usr/bin/env bash
# A repository on a model from the Hugging Face hub, and a first careful edit.
#
#     bash hub-model.sh ORG/NAME@REVISION FACTS [DIR]
#
# Name a commit as the revision, not a branch: the base must stay what it is. A folder with a checkpoint does
# as well (that is how the tests run this script; they have no hub). A gated model wants `hf auth login` first.
set -euo pipefail
base=$1
facts=$(realpath "$2")
folder=${3:-knowledge}

# 1. Can it be edited, and where? Nothing is written. A model that cannot is refused here, with the reason.
patchkit model check "$base"

# 2. The repository. patchkit.toml gets the base's commit, its fingerprint, and a recipe.
patchkit init "$base" "$folder"
cd "$folder"

# 3. Is the recipe a guess? Then it comes from a rule of thumb: take what a sister of your model has in the
#    table of docs/recipes.md, or try in this order, each with --dry-run, on three or four facts:
#      lambda  higher (x 4) where neighbours move, lower (/ 4) where edits do not take
#      layers  five in a row; a little earlier or later where paraphrases do not follow
#      steps, learning_rate  more where P after stays low
#    On the command line (--set lambda=4000, --layers 6-10) for a try; in patchkit.toml, committed, for good.
if grep -q '^guess = true' patchkit.toml; then
    echo "the recipe is a guess: read step 3 of this script before you ship"
fi

# 4. Sound facts first: this loads no model.
patchkit facts check "$facts"

# 5. The edit, without a commit: what would it say, and what else would move? The first run also collects
#    statistics of the base, which takes minutes to an hour and is kept for all later ones.
patchkit commit "$facts" --dry-run ${SETTINGS:-}

# 6. For good, and only if it is good: below a gate nothing is committed (exit code 3), and the patch is kept aside.
#    Give facts `neighbors`, prompts that must not change, and put neighbors=0.95 into the gate.
patchkit commit "$facts" --gate "${GATE:-efficacy=0.9,generation=0.8}" ${SETTINGS:-}

# 7. Ship the build, and know the way back: `patchkit revert`.
patchkit build --out model
patchkit fsck
