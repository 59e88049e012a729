"""A CUDA without a GPU that has CUDA's rules: the product's own code runs on ``cuda:1``, and every breach is an error.

How to use it::

    from tests.cuda_rules import Machine

    with Machine() as machine:            # two GPUs; this run's is machine.device, cuda:1
        ones = torch.ones(3, device=machine.device)
        side = torch.cuda.Stream(machine.device)
        with torch.cuda.stream(side):
            ones.mul_(2)                  # RuleBroken: the side stream does not wait for the default one

Tensors on ``machine.device`` are :class:`~tests.cuda_rules.tensors.DeviceTensor`. They compute at once, on a CPU tensor
in ``inner``. What is checked is the order that a GPU would be free to choose.

* Streams: an operation belongs to the calling thread's current stream. A read of memory that another stream wrote, or
  a write to memory that another stream uses, needs an event, or a wait of the host, in between. Allocating counts as a
  write. The error names both operations with their places in the code.
* Host memory: asynchronous copies use pinned memory (``pin_memory=True`` or ``cudaHostRegister``). The host may read
  what was copied to it, and rewrite what is copied from it, only when it knows that the copy has finished. Registered
  memory must not be unregistered before.
* Freed memory goes back to the stream that allocated it. Another stream that still uses it must have been told by
  ``record_stream``, or the allocating stream must have waited for it.
* Threads: a new thread has device 0. Any call of CUDA there, before ``set_device``, is an error: it opens a context on
  GPU 0.
* Waits of the host (``item()``, ``cpu()``, ``nonzero``, blocking copies, ``synchronize()``) are listed in
  ``machine.waits``, with thread and place. ``with machine.no_waits():`` makes those of the calling thread errors.
* ``numpy()``, ``np.from_dlpack`` and DLPack of a tensor that requires grad are refused as torch refuses them.

Breaches raise :class:`RuleBroken`. ``machine.breaches`` lists them. At its end the context raises those that a thread
swallowed, and those that were found when memory was freed. A test of a breach uses ``with machine.expect("text"):``,
after which that breach is forgotten. ``machine.launched`` tells which threads used which streams.

Limits. Order between host threads is the order in which they ran. ``Event.query()`` is False until the host has waited,
or the test has called ``machine.device_catches_up()``.
Kernels of CuPy do not run: torch takes their place, so a test patches ``embrag_ds.ops.cuda.available`` where CuPy is
installed. Accesses of numpy to pinned memory are not seen. The calling thread has chosen the run's device;
``Machine(set_device=False)`` leaves it on GPU 0, as a new thread is.
"""

from tests.cuda_rules.machine import Machine
from tests.cuda_rules.order import RuleBroken

__all__ = ["Machine", "RuleBroken"]
