"""Data: labelled samples, the real mini set, phantoms, augmentation, questions, readers of public sets.

Names load on first use; none of the ones listed here imports torch. `augment` is in `medplib.data.augment`.
"""

from medplib.lazy import lazily

_WHERE = {
    "Augmentation": "transforms",
    "ImageSample": "samples",
    "Structure": "samples",
    "MODALITIES": "samples",
    "TIERS": "samples",
    "Bytes": "files",
    "File": "files",
    "Held": "files",
    "ImageFile": "files",
    "MaskFile": "files",
    "READERS": "readers",
    "read": "readers",
    "RecordSet": "recordset",
    "contact_sheet": "sheet",
    "Record": "record",
    "load_mini": "mini",
    "default_mini_root": "mini",
    "keyed_rng": "samples",
    "PHANTOMS": "phantoms",
    "make_phantom": "phantoms",
    "simulate_pet": "simulate",
}

__all__ = list(_WHERE)
__getattr__, __dir__ = lazily(__name__, _WHERE)
