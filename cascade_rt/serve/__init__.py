"""The HTTP service: OpenAI's Images API over bundles, with several people's pictures in one engine call.

HTTP (`api`, `app`) -> `orders.Order` -> planned -> `batcher.Batcher` -> pixels -> encoded -> HTTP. `pool` says where
the batcher runs: in this process, or in replicas of Ray Serve (`ray_pool`). Nothing outside this folder imports it.
"""
