"""`GET /v1/models` and `GET /v1/models/{id}`: the names under which the model is served."""

from fastapi import APIRouter

from kvwise.server.api.answers import ModelCard, ModelList
from kvwise.server.api.routing import require_model
from kvwise.server.context import Server
from kvwise.server.gates import known
from kvwise.server.strict import gated


def routes(server: Server) -> APIRouter:
    """The routes."""
    router = APIRouter(route_class=gated(known(server)))

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """All names of the model."""
        return ModelList(object="list", data=[_card(server, name) for name in server.model_names])

    @router.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> ModelCard:
        """One of the names; they may have slashes."""
        require_model(server, model)
        return _card(server, model)

    return router


def _card(server: Server, name: str) -> ModelCard:
    return ModelCard(
        id=name, object="model", created=server.created, owned_by="kvwise",
        max_model_len=server.service.max_request_tokens(),
    )  # fmt: skip
