"""Reference images, made once for the same picture, arguments and weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from cldm.files import atomic_path, source_digest
from cldm.request import Request
from cldm.result import Result

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Reference:
    """What the original algorithm made.

    Attributes
    ----------
    image : (H, W, 3) uint8 array
    latent : (1, 4, h, w) float32 array
    receipt : dict
        `cldm.result.Receipt` as plain values.
    cached : bool
        Whether it was read from the cache.
    """

    image: np.ndarray
    latent: np.ndarray
    receipt: Dict[str, Any]
    cached: bool = False

    @classmethod
    def from_result(cls, result: Result) -> Reference:
        return cls(result.images[0], result.latent, result.receipt.to_dict())


def reference_sources() -> List[Path]:
    """The sources that decide what a reference image is, its weights and token ids apart."""
    names = ("controlnet.py", "image.py", "model.py", "noise.py", "reference.py", "request.py")
    return [*sorted((ROOT / "ldm").glob("*.py")), *(ROOT / "cldm" / name for name in names)]


def reference_key(picture_digest: str, request: Request, weights_digest: str, token_digest: str, device: str) -> str:
    """Hash over everything that decides a reference image.

    Parameters
    ----------
    token_digest : str
        Hash of the token ids of the request's texts: what its words are depends on the vocabulary that is there.
    device : str
        Counts because the noise is drawn and the last bits are computed there; of a CUDA device its name as well. The
        versions of PyTorch and OpenCV count because theirs are the networks' arithmetic and the canny map.
    """
    import cv2
    import torch

    parts = {
        "picture": picture_digest,
        "request": dataclasses.asdict(request),
        "weights": weights_digest,
        "tokens": token_digest,
        "device": device,
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "code": source_digest(reference_sources()),
        "torch": torch.__version__,
        "opencv": cv2.__version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class ReferenceCache:
    """One .npz file a reference in a folder; a damaged one counts as absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.npz"

    def load(self, key: str) -> Optional[Reference]:
        """The reference of that key, or None where the file is absent, truncated, damaged or of another key."""
        try:
            with np.load(str(self.path(key)), allow_pickle=False) as file:
                if str(file["key"]) != key:
                    return None
                image, latent, receipt = file["image"], file["latent"], json.loads(str(file["receipt"]))
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
            return None
        if image.dtype != np.uint8 or image.ndim != 3 or latent.dtype != np.float32 or latent.ndim != 4:
            return None
        return Reference(image, latent, receipt, cached=True)

    def store(self, key: str, reference: Reference) -> None:
        """Write a reference, whole or not at all.

        Raises
        ------
        OSError
            The folder cannot be written or its disk is full.
        """
        with atomic_path(self.path(key)) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file,
                key=np.array(key),
                image=reference.image,
                latent=reference.latent.astype(np.float32, copy=False),
                receipt=np.array(json.dumps(reference.receipt)),
            )
