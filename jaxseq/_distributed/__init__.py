"""Arrays on explicit meshes and inside `shard_map`.

An op whose arrays are not distributed (`jaxseq._mesh.is_distributed`) never enters this package.
"""
