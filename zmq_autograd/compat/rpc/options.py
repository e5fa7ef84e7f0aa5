"""How a process takes part: timeouts, where workers meet, where this one listens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zmq_autograd.compat.rpc import constants
from zmq_autograd.wire import DEFAULT_LIMITS, Limits

Device = int | str | torch.device
DeviceMap = dict[torch.device, torch.device]


class RpcBackendOptions:
    """Options of any backend.

    Attributes:
        rpc_timeout: seconds that a call may take by default; 0 for no limit.
        init_method: where the store is that workers meet at: ``env://``, ``tcp://host:port`` or
            ``file://path``.
    """

    def __init__(
        self,
        rpc_timeout: float = constants.DEFAULT_RPC_TIMEOUT_SEC,
        init_method: str = constants.DEFAULT_INIT_METHOD,
    ) -> None:
        if isinstance(rpc_timeout, bool) or not isinstance(rpc_timeout, (int, float)):
            raise TypeError(
                "incompatible constructor arguments: rpc_timeout is a number of seconds, got "
                f"{rpc_timeout!r}"
            )
        if not isinstance(init_method, str):
            raise TypeError(
                f"incompatible constructor arguments: init_method is a str, got {init_method!r}"
            )
        self.rpc_timeout = float(rpc_timeout)
        self.init_method = init_method


class TensorPipeRpcBackendOptions(RpcBackendOptions):
    """What programs pass to `init_rpc`; the name is torch's, nothing of TensorPipe is here.

    Attributes:
        num_worker_threads: kept for those that read it: threads are started as they are needed.
        device_maps: which device of a callee stands for which one here.
        devices: the devices used.
        listen: the endpoint that this worker listens on; None for one on the loopback interface.
        insecure: it may listen beyond this machine although nothing is encrypted and nobody proves
            who he is: the network is trusted.
        limits: what this worker takes in of one message, and how many calls of one worker at once.
    """

    def __init__(
        self,
        *,
        num_worker_threads: int = constants.DEFAULT_NUM_WORKER_THREADS,
        rpc_timeout: float = constants.DEFAULT_RPC_TIMEOUT_SEC,
        init_method: str = constants.DEFAULT_INIT_METHOD,
        device_maps: Mapping[str, Mapping[Device, Device]] | None = None,
        devices: Sequence[Device] | None = None,
        listen: str | None = None,
        insecure: bool = False,
        limits: Limits = DEFAULT_LIMITS,
        _transports: Sequence[str] | None = None,
        _channels: Sequence[str] | None = None,
    ) -> None:
        """Make options; ``_transports`` and ``_channels`` are TensorPipe's own, and ignored.

        Raises:
            TypeError: an argument is of another type.
            ValueError: a device map is not one to one.
        """
        super().__init__(rpc_timeout, init_method)
        self.num_worker_threads = num_worker_threads
        self.device_maps: dict[str, DeviceMap] = {}
        self.devices: list[torch.device] = []
        self.listen = listen
        self.insecure = insecure
        self.limits = limits
        for to, device_map in (device_maps or {}).items():
            self.set_device_map(to, device_map)
        if devices is not None:
            self.set_devices(devices)

    def set_device_map(self, to: str, device_map: Mapping[Any, Any]) -> None:
        """Say which device of worker `to` stands for which one here; adds to what was said.

        Raises:
            ValueError: two devices would stand for one.
        """
        merged = dict(self.device_maps.get(to, {}))
        for here, there in device_map.items():
            source, target = torch.device(here), torch.device(there)
            if merged.get(source, target) != target:
                raise ValueError(
                    "`set_device_map` only supports 1-to-1 mapping, trying to map "
                    f"{source} to {target} and {merged[source]}"
                )
            merged[source] = target
        if len(set(merged.values())) != len(merged):
            raise ValueError(f"`device_map` only supports 1-to-1 mapping, got {merged}")
        self.device_maps[to] = merged

    def set_devices(self, devices: Sequence[Device]) -> None:
        """Say which devices are used.

        Raises:
            ValueError: one is no CUDA device.
        """
        found = [torch.device(device) for device in devices]
        for device in found:
            if device.type != "cuda":
                raise ValueError(
                    "`set_devices` expect a list of CUDA devices, but got device type "
                    f"{device.type}."
                )
        self.devices = found
