"""Types of Ray actors. mypy does not read class decorators, and so not what @ray.remote adds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:

    class Actor:
        """Base class of classes decorated with @ray.remote; at run time it is `object`."""

        @classmethod
        def remote(cls, *arguments: Any, **named: Any) -> Any:
            """Start the actor and return its handle."""

        @classmethod
        def options(cls, **options: Any) -> type[Actor]:
            """The same class with other resources or another placement."""
else:
    Actor = object
