"""The weights hub: is it there, before anyone waits for it?

Hugging Face's client tries an unreachable hub for most of a minute before it says so.
"""

import socket
import urllib.parse
import urllib.request

import timm
from huggingface_hub import constants, try_to_load_from_cache

from calibrators.errors import ModelError

__all__ = ["check_hub"]


def check_hub(name: str) -> None:
    """Return if pretrained weights of `name` exist and are cached, or their hub can be reached.

    Raises:
        ModelError: There are none, or they cannot be had from here.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None:
        return  # one of timm's deprecated names; it says so and maps it
    if not config.has_weights:
        raise ModelError(
            what=f"timm knows no pretrained weights for `{name}`.",
            why="this name was never published with weights.",
            fix="pass --checkpoint FILE, or --random-weights to try the pipeline.",
        )
    cached = config.hf_hub_id and isinstance(try_to_load_from_cache(config.hf_hub_id, "model.safetensors"), str)
    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    if cached or urllib.request.getproxies() or _resolves(str(host)):
        return
    raise ModelError(
        what=f"the pretrained weights of `{name}` cannot be fetched.",
        why=f"the hub ({host}) is out of reach and they are not in its local cache.",
        fix="pass --checkpoint FILE with the weights, or --model demo, which ships with the package.",
    )


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
