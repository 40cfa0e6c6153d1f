"""/v1/keys: the API keys of this project; for keys with scope admin."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import Field, StringConstraints

from gnomon.resources import ApiKey, NewApiKey, Page
from gnomon.specs import Spec
from gnomon_service.rest.deps import Admin, Id, ServicesDep
from gnomon_service.tenancy.keys import LONGEST_LIFE_S, Scope

router = APIRouter(prefix="/v1/keys", tags=["keys"])


class KeyRequest(Spec):
    """Body of POST /v1/keys."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f]*$")]
    """A label for people."""
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1, max_length=3)] = ("read", "write")
    """What the key may do; write includes read, admin includes both."""
    expires_in_s: Annotated[int, Field(ge=1, le=LONGEST_LIFE_S)] | None = None
    """Seconds until it expires; None = never."""


@router.post("", status_code=201)
def create_key(body: KeyRequest, response: Response, principal: Admin, services: ServicesDep) -> NewApiKey:
    """Make a key; its text is in this answer and nowhere else."""
    response.headers["Cache-Control"] = "no-store"
    return services.keys.create(
        project=principal.project, name=body.name, scopes=body.scopes, expires_in_s=body.expires_in_s
    )


@router.get("")
def list_keys(principal: Admin, services: ServicesDep) -> Page[ApiKey]:
    """Every key of this project, without its secret, on one page."""
    return Page[ApiKey](items=services.keys.list(principal.project))


@router.delete("/{key_id}", status_code=204)
def revoke_key(key_id: Id, principal: Admin, services: ServicesDep) -> None:
    """Revoke a key; it is refused from now on."""
    services.keys.revoke(principal.project, key_id)
