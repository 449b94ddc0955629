"""The model card of a published detector: YAML head with a model-index, then the same for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

# Our metric names, and the type and full name that model cards use.
METRICS = {
    "image_auroc": ("roc_auc", "image AUROC"),
    "pixel_auroc": ("roc_auc", "pixel AUROC"),
    "aupro": ("aupro", "AUPRO (FPR limit 0.3)"),
    "image_ap": ("average_precision", "image average precision"),
    "pixel_ap": ("average_precision", "pixel average precision"),
    "image_f1": ("f1", "image F1 at the best threshold"),
    "pixel_f1": ("f1", "pixel F1 at the best threshold"),
    "miou": ("mean_iou", "mean IoU"),
}


def model_card(
    *,
    name: str,
    method: str,
    backbone: str,
    dataset: str,
    licence: str,
    licence_note: str,
    measured: Mapping[str, float],
    provenance: Mapping[str, Any],
) -> str:
    """Return the README of a detector for the hub.

    Args:
        name: title.
        method: "cflow".
        backbone: "lite0".
        dataset: what it was fitted and measured on, "mvtec/cable".
        licence: of the training data, which bind the detector: "CC BY-NC-SA 4.0".
        licence_note: one plain sentence on commercial use.
        measured: metric name to value, as fractions, all on the test images of ``dataset``.
        provenance: versions, seed, date, fingerprint of the data; printed as it is.
    """
    results = [
        {
            "type": METRICS.get(key, (key, key))[0],
            "name": METRICS.get(key, (key, key))[1],
            "value": round(float(value), 4),
        }
        for key, value in measured.items()
    ]
    task = {"type": "image-segmentation", "name": "Anomaly detection"}
    head: dict[str, Any] = {
        "library_name": "adflow",
        "license": _slug(licence),
        "tags": ["anomaly-detection", "visual-inspection", "adflow", method],
        "pipeline_tag": "image-segmentation",
        "datasets": [dataset],
        "model-index": [
            {
                "name": name,
                "results": [{"task": task, "dataset": {"type": dataset, "name": dataset}, "metrics": results}],
            }
        ],
    }
    if head["license"] == "other":
        head["license_name"] = licence
    if not results:
        del head["model-index"]
    rows = "\n".join(f"| {row['name']} | {row['value']} |" for row in results) or "| none measured | |"
    facts = "\n".join(f"- {key}: {value}" for key, value in provenance.items())
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n# {name}\n\n"
        f"An anomaly detector made with adflow: method `{method}`, backbone `{backbone}` (not included), "
        f"fitted on the good training images of `{dataset}`.\n\n"
        f"    adflow download hub:OWNER/NAME\n    adflow score --model FILE IMAGES\n\n"
        f"## Measured on the test images\n\n| metric | value |\n|---|---|\n{rows}\n\n"
        "The last state of the training was measured; nothing was selected on test images.\n\n"
        f"## Licence\n\nBound by its training data: {licence}. {licence_note}\n\n## Provenance\n\n{facts}\n"
    )


def _slug(licence: str) -> str:
    """Return the hub's short name of a licence, or "other"."""
    known = {
        "CC BY-NC-SA 4.0": "cc-by-nc-sa-4.0",
        "CC0 1.0": "cc0-1.0",
        "CC BY 4.0": "cc-by-4.0",
        "CC BY-SA 4.0": "cc-by-sa-4.0",
        "Apache-2.0": "apache-2.0",
        "BSD-2-Clause": "bsd-2-clause",
        "BSD-3-Clause": "bsd-3-clause",
        "MIT": "mit",
        "AGPL-3.0": "agpl-3.0",
    }
    return known.get(licence, "other")
