"""What the sync and the asyncio client share: the attempts of a call, deadlines, options of a channel."""

from __future__ import annotations

import functools
import inspect
import random
import time
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import grpc

from cluster.client.errors import RefusedError, client_error
from cluster.client.requests import set_timeout
from ernie_serving.v1 import inference_pb2

DEFAULT_ADDRESS = "127.0.0.1:9000"
DEFAULT_RETRIES = 2
CONTROL_TIMEOUT_S = 10.0
"""For calls that generate nothing."""
_FIRST_DELAY_S = 0.5
"""Before the first retry where the server names no delay; doubles with each."""
_JITTER = 0.25
"""Largest part added to a delay, so that clients refused together do not come back together."""
_MAX_RECEIVED_BYTES = 64 * 2**20
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def channel_options(address: str, *, own_connection: bool) -> list[tuple[str, int]]:
    """``own_connection``: do not share the connection other clients of this process have to the same address."""
    options = [("grpc.max_receive_message_length", _MAX_RECEIVED_BYTES)]
    if own_connection:
        options.append(("grpc.use_local_subchannel_pool", 1))
    if address.rpartition(":")[0] in _LOOPBACK:
        # A proxy of the environment is not on the way to this machine.
        options.append(("grpc.enable_http_proxy", 0))
    return options


class Attempts:
    """The attempts of one call: how long each may take, and after which failure there is another.

    Only a refusal by the service is tried again - never a lost connection, and nothing once an event has come - and
    only where the wait ends before the deadline.
    """

    def __init__(
        self,
        retries: int,
        timeout_s: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._retries_left = retries
        self._delay_s = _FIRST_DELAY_S
        self._clock = clock
        self._draw = draw
        self._deadline = None if timeout_s is None else clock() + timeout_s
        self.begun = False
        """Whether an event has come. The faces set it."""

    def left_s(self) -> float | None:
        """Time left for the next attempt; None without a deadline."""
        return None if self._deadline is None else max(0.0, self._deadline - self._clock())

    def again_after_s(self, error: grpc.RpcError) -> float:
        """How long to wait before the next attempt. Raises the ClientError when there is none."""
        failure = client_error(error)
        if self.begun or self._retries_left <= 0 or not isinstance(failure, RefusedError):
            raise failure from None
        delay_s = self._delay_s if failure.retry_after_s is None else failure.retry_after_s
        delay_s *= 1 + _JITTER * self._draw()
        left_s = self.left_s()
        if left_s is not None and delay_s >= left_s:
            raise failure from None
        self._retries_left -= 1
        self._delay_s *= 2
        return delay_s


class GenerateAttempts(Attempts):
    """Those of a generation, whose time is ``timeout_s`` or else the request's own.

    The time left is copied into the request of each attempt, because proxies do not pass deadlines on.
    """

    def __init__(self, retries: int, request: inference_pb2.GenerateRequest, timeout_s: float | None) -> None:
        if timeout_s is None and request.HasField("timeout"):
            timeout_s = request.timeout.seconds + request.timeout.nanos / 1e9
        super().__init__(retries, timeout_s)
        self._request = request

    def request(self) -> inference_pb2.GenerateRequest:
        """The request of the next attempt."""
        left_s = self.left_s()
        if left_s is None:
            return self._request
        copied = inference_pb2.GenerateRequest()
        copied.CopyFrom(self._request)
        set_timeout(copied, left_s)
        return copied


P = ParamSpec("P")
Request = TypeVar("Request")
Result = TypeVar("Result")
Self = TypeVar("Self")


def taking(
    build: Callable[P, Request],
) -> Callable[[Callable[[Self, Request], Result]], Callable[Concatenate[Self, P], Result]]:
    """Makes a method of one request take what ``build`` makes the request from."""

    def decorate(method: Callable[[Self, Request], Result]) -> Callable[Concatenate[Self, P], Result]:
        @functools.wraps(method)
        def taken(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> Result:
            return method(self, build(*args, **kwargs))

        taken.__signature__ = _joined(method, build)  # type: ignore[attr-defined]
        return taken

    return decorate


def _joined(method: Callable[..., object], build: Callable[..., object]) -> inspect.Signature:
    """What ``help`` shows: the method's ``self`` and result, and the parameters of ``build``."""
    own = inspect.signature(method)
    self = next(iter(own.parameters.values())).replace(kind=inspect.Parameter.POSITIONAL_ONLY)
    return own.replace(parameters=[self, *inspect.signature(build).parameters.values()])
