"""`python -m gnomon_service`: the host's commands without the SDK's CLI around them."""

from __future__ import annotations

from gnomon_service.commands import main

main()
