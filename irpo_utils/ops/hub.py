"""A time limit for the hub: its library waits for ever for a server that takes a call and then says nothing."""

from __future__ import annotations


def limit_waiting() -> None:
    """Let every request to the hub end within HF_HUB_DOWNLOAD_TIMEOUT (10 seconds by default) without an answer; once is enough.

    Some of the library's own calls set no limit at all, and repeated ones a minute each.
    """
    from huggingface_hub import constants, get_session

    def limit(request):
        seconds, given = constants.HF_HUB_DOWNLOAD_TIMEOUT, request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            kind: min(given.get(kind) or seconds, seconds)
            for kind in ("connect", "read", "write", "pool")
        }

    session = get_session()
    if not getattr(session, "waits_within_limit", False):
        session.event_hooks = {
            **session.event_hooks,
            "request": [*session.event_hooks["request"], limit],
        }
        session.waits_within_limit = True
