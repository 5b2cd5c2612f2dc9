"""A trained committee as one node."""

import json
from pathlib import Path
from typing import Any, Self

from aiida.common.exceptions import ValidationError
from aiida.orm import Data

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"

# What of the configuration one may want to query; the file in the repository has all of it.
ATTRIBUTES = (
    "schema_version",
    "stage",
    "seeds",
    "elements",
    "heads",
    "n_drawn",
    "eips",
    "network",
    "versions",
)


class CommitteeData(Data):
    """The members of a committee: a JSON configuration and safetensors weights, no pickles."""

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Build the unstored node of a committee saved in ``folder``.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        """
        node = cls()
        for name in (CONFIG, WEIGHTS):
            with (folder / name).open("rb") as stream:
                node.base.repository.put_object_from_filelike(stream, name)
        config = node.config()
        node.base.attributes.set_many({key: config[key] for key in ATTRIBUTES if key in config})
        node.base.attributes.set("n_members", len(config["seeds"]))
        return node

    def config(self) -> dict[str, Any]:
        """Return the configuration of the committee."""
        return dict(json.loads(self.base.repository.get_object_content(CONFIG)))

    def save(self, folder: Path) -> None:
        """Write the files, for :meth:`aiida_eipnn.science.nn.committee.Committee.load`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, WEIGHTS):
            (folder / name).write_bytes(self.base.repository.get_object_content(name, mode="rb"))

    def _validate(self) -> bool:
        super()._validate()
        missing = {CONFIG, WEIGHTS} - set(self.base.repository.list_object_names())
        if missing:
            raise ValidationError(f"a committee needs the files {sorted(missing)}")
        return True
