"""``co3d serve``: many streams on one compiled model, behind HTTP and WebSocket, on Ray Serve (docs/serve.md).

- `options`: what a server may be told; its limits.
- `engine`: one model and the states of its streams; advances some of them in one run.
- `shard`: takes frames in order, batches those of different streams, keeps snapshots, drops idle streams.
- `store`: snapshots in a folder.
- `gateway`: HTTP and WebSocket to the shards. `cluster`: shards and gateway as Ray Serve deployments.
- `client`: a stream from Python, which sends again what was lost.

Nothing but `gateway` needs Starlette, nothing but `cluster` Ray, nothing but `client` the package websockets.
"""
