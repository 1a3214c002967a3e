"""One serving engine: KV cache, scheduler, sampler, runner."""
