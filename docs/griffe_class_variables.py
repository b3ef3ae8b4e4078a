"""For mkdocstrings: class variables of dataclasses are no arguments of their constructors."""

import griffe


class ClassVariables(griffe.Extension):
    """Drops attributes annotated as a bare ``ClassVar``, which griffe takes for fields."""

    def on_class_members(self, *, cls: griffe.Class, **_: object) -> None:
        for name, member in list(cls.members.items()):
            if member.is_attribute and str(member.annotation) == "ClassVar":
                del cls.members[name]
