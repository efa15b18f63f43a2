"""A distilled set read by NumPy, Pillow, pyarrow and safetensors alone, for Keras, JAX and whoever has no torch.

    views, labels, logits = read("runs/demo/distilled")

Views float32 [views, height, width, 3] in [0, 1]; labels int64 [views]; logits float16 [views, classes] or None. For
sets of 8-bit images whose views are exact, with hard or static labels. `python examples/read_with_numpy.py DIR`.
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import load_file


def read(folder):
    folder = Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    path = {role: folder / facts["name"] for role, facts in manifest["files"].items()}
    rows = pq.read_table(path["images"]).to_pydict()
    images = np.stack([np.asarray(Image.open(io.BytesIO(i["bytes"])).convert("RGB")) for i in rows["image"]])
    images, labels, slots = images.astype(np.float32) / 255, np.array(rows["label"]), np.array(rows["slot"])
    blocks = [images] if manifest["views"]["naturals_as_views"] or "compensators" not in path else []
    if "compensators" in path:
        stored = load_file(path["compensators"])
        added = stored["compensators"].astype(np.float32) * stored.get("scale", np.float32(1))
        blocks += [images + own[slots].transpose(0, 2, 3, 1) for own in added]  # own: [slots, 3, height, width]
    views = np.concatenate(blocks)
    views = views.clip(0, 1) if manifest["views"]["clip"] else views
    logits = load_file(path["labels"])["logits"] if "labels" in path else None
    return views, np.tile(labels, len(blocks)), logits


if __name__ == "__main__":
    views, labels, logits = read(sys.argv[1])
    print("views", views.shape, views.dtype, "labels", labels.shape, "logits", None if logits is None else logits.shape)
