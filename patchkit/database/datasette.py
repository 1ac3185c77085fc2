"""What Datasette is told of the catalogue: what tables and views hold, their order, facets and search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from patchkit.files import write_durably

__all__ = ["metadata", "write_metadata"]

FILE = "datasette.json"

_TABLES: dict[str, dict[str, Any]] = {
    "patches_in_force": {
        "description": "The stack: the patches in force at the commit that was last indexed.",
        "sort_desc": "date",
        "facets": ["author", "method"],
    },
    "facts_in_force": {
        "description": "Every fact in force at the commit that was last indexed.",
        "facets": ["patch", "relation"],
    },
    "layer_shares": {
        "description": "The Frobenius norm of each version's updates, and its share of the base weight's.",
        "sort_desc": "share",
        "facets": ["weight", "form", "in_force"],
    },
    "measured_facts": {
        "description": "What was measured of facts on this machine: before the edit and after it.",
        "sort_desc": "date",
        "facets": ["patch", "device"],
    },
    "log": {
        "description": "Commits that touched the stack: + added, ~ solved again, - removed.",
        "sort_desc": "date",
        "facets": ["author"],
    },
    "commits": {
        "description": "Commits that touched patches.",
        "sort_desc": "date",
        "label_column": "subject",
        "facets": ["author"],
    },
    "changes": {"description": "What each commit did to patch folders.", "facets": ["kind"]},
    "patches": {
        "description": "Versions of patches; the id is the SHA-256 of delta.safetensors.",
        "label_column": "name",
        "facets": ["method"],
    },
    "recipes": {"description": "Recipes that patches were made with.", "label_column": "method"},
    "facts": {
        "description": "Facts of every version of every patch.",
        "fts_table": "facts_fts",
        "fts_pk": "id",
        "label_column": "subject",
        "facets": ["relation"],
    },
    "layers": {"description": "Edited weights of each version.", "sort_desc": "norm", "facets": ["form"]},
    "base_weights": {"description": "Norms of the weights of bases.", "sort_desc": "norm"},
    "results": {"description": "Facts as they were measured, as JSON.", "sort_desc": "date"},
    "evaluations": {
        "description": "Metrics of a version or a stack.",
        "sort_desc": "date",
        "facets": ["dataset"],
    },
    "timings": {"description": "Seconds by phase of each edit.", "sort_desc": "date", "facets": ["phase"]},
    "builds": {"description": "Builds written from here.", "sort_desc": "date"},
    "environments": {"description": "Devices and versions that something was measured with."},
    **{
        name: {"hidden": True}
        for name in (
            *("trees", "members", "state", "checked_tips", "violations", "fingerprints"),
            "_sqlite_migrations",
        )
    },
}


def metadata() -> dict[str, Any]:
    """The metadata, in the form of Datasette's metadata.json."""
    return {
        "title": "patchkit",
        "description": "What a language model was taught, by which patch, and what was measured of it.",
        "databases": {
            "catalogue": {
                "description": "Begin with the views: patches_in_force, facts_in_force, measured_facts, log.",
                "tables": _TABLES,
            }
        },
    }


def write_metadata(folder: Path) -> Path:
    """Write them into the folder of the catalogue, and say where."""
    path = folder / FILE
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(path, (json.dumps(metadata(), indent=2) + "\n").encode())
    return path
