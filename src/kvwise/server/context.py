"""What the routes share: built once by `app.create_app`, handed to each module's `routes(server)`."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvwise.engine.service import EngineService
from kvwise.server.record import RequestObserver
from kvwise.server.settings import ServerSettings
from kvwise.server.tenancy.tenants import Tenants


@dataclass(slots=True)
class Server:
    """A service, who may use it, and who is told."""

    service: EngineService
    settings: ServerSettings
    tenants: Tenants
    observers: list[RequestObserver] = field(default_factory=list)
    created: int = 0  # Unix seconds, of the model's entry in /v1/models

    @property
    def model_names(self) -> Sequence[str]:
        """Names of the model; the first is what answers say."""
        return self.settings.model_names
