"""Nodes that keep one value of the science as plain ``.npy`` files."""

from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from aiida.orm import ArrayData

from aiida_eipnn.science.arrays import Arrays, load_arrays

SCHEMA_VERSION = 1


class HasArrays(Protocol):
    """A value of the science that is nothing but named arrays."""

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Build from :meth:`arrays`."""
        ...

    def arrays(self) -> Arrays:
        """Return every array by name."""
        ...


class ScienceData(ArrayData):
    """Array node of one value of the science.

    The arrays have fixed names, so that equal values have equal hashes, and a clone, an import or
    a reader without this package finds them.
    """

    value_class: ClassVar[type[HasArrays]]

    @classmethod
    def from_value(cls, value: HasArrays, **attributes: Any) -> Self:
        """Build the unstored node of ``value``."""
        node = cls()
        for name, array in value.arrays().items():
            node.set_array(name, array)
        node.set_facts(value, attributes)
        return node

    @classmethod
    def from_folder(cls, folder: Path, **attributes: Any) -> Self:
        """Build the unstored node of the arrays in ``folder``, without reading all of them.

        Raises
        ------
        FileNotFoundError, ValueError
            If the arrays are missing or do not make up a value.
        """
        arrays = load_arrays(folder, mapped=True)
        value = cls.value_class.from_arrays(arrays)
        node = cls()
        for name in value.arrays():
            node.base.repository.put_object_from_file(str(folder / f"{name}.npy"), f"{name}.npy")
            node.base.attributes.set(f"{cls.array_prefix}{name}", list(arrays[name].shape))
        node.set_facts(value, attributes)
        return node

    def set_facts(self, value: HasArrays, attributes: dict[str, Any]) -> None:
        """Set what one may want to query; the arrays are known to make up this value."""
        facts = {"schema_version": SCHEMA_VERSION, **self.facts(value), **attributes}
        self.base.attributes.set_many(facts)
        self._is_valid = True

    def set_array(self, name: str, array: Any) -> None:
        """Set an array; whether it fits the others is seen when the node is stored."""
        super().set_array(name, array)
        self._is_valid = False

    @classmethod
    def facts(cls, value: Any) -> dict[str, Any]:
        """Return what one may want to query, as attributes."""
        return {}

    def value(self) -> Any:
        """Return the value of the science."""
        return self.value_class.from_arrays(
            {name: self.get_array(name) for name in self.get_arraynames()}
        )

    def _validate(self) -> bool:
        super()._validate()
        # Checked when it was built; to do so again would read all of it.
        if getattr(self, "_is_valid", False):
            return True
        try:
            self.value()
        except ValueError as error:
            from aiida.common.exceptions import ValidationError

            raise ValidationError(str(error)) from error
        return True
