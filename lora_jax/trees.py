"""Parameter trees by path: flatten, replace, match, count, hash.

A path is the keys inside the `params` collection joined by `/`, without the collection's name:
`{'params': {'layers_0': {'kernel': w}}}` has the one path `layers_0/kernel`. A tree without a `params` collection (a
plain
dictionary of weights, an NNX state) is taken whole. Every selection, sharding and decay rule in this project is a
pattern on these paths.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
COLLECTION = "params"


def _name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _path(keypath: tuple, has_collection: bool) -> str | None:
    """The path of one leaf, or None if the leaf lies outside the `params` collection."""
    if has_collection:
        if _name(keypath[0]) != COLLECTION:
            return None
        keypath = keypath[1:]
    # A box (nnx.Variable, nn.LogicallyPartitioned) is a node with one attribute; it is not part of the path.
    if keypath and keypath[-1] == jax.tree_util.GetAttrKey("value"):
        keypath = keypath[:-1]
    return "/".join(_name(k) for k in keypath)


def _leaves(tree: Tree, is_leaf: Callable | None = None):
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    has_collection = isinstance(tree, Mapping) and COLLECTION in tree
    return [(_path(k, has_collection), leaf) for k, leaf in pairs], treedef


def flatten(tree: Tree, is_leaf: Callable | None = None) -> dict[str, Any]:
    """Returns `{path: leaf}` for the leaves of the `params` collection, in the tree's own order."""
    return {path: leaf for path, leaf in _leaves(tree, is_leaf)[0] if path is not None}


def replace(tree: Tree, new: Mapping[str, Any], is_leaf: Callable | None = None) -> Tree:
    """Returns the tree with some leaves replaced.

    Args:
      tree: any tree of parameters; not changed.
      new: `{path: value}`; a value may be an array or a whole node (an adapted weight).
      is_leaf: says which nodes of the tree are one leaf (adapted weights that are already there).

    Raises:
      KeyError: a path that the tree does not have.
    """
    pairs, treedef = _leaves(tree, is_leaf)
    missing = set(new) - {path for path, _ in pairs}
    if missing:
        raise KeyError(f"the tree has no {sorted(missing)[:3]}")
    return treedef.unflatten([new.get(path, leaf) if path is not None else leaf for path, leaf in pairs])


def map_with_path(function: Callable[[str, Any], Any], tree: Tree, is_leaf: Callable | None = None) -> Tree:
    """Returns the tree with `function(path, leaf)` at every leaf (path is '' outside the `params` collection)."""
    pairs, treedef = _leaves(tree, is_leaf)
    return treedef.unflatten([function(path or "", leaf) for path, leaf in pairs])


def matches(pattern: str, path: str) -> bool:
    """True if the regular expression matches the whole path."""
    return re.fullmatch(pattern, path) is not None


def count(tree: Tree, is_leaf: Callable | None = None) -> int:
    """Number of elements of all array leaves; of a node that `is_leaf` names, the number that its shape says."""
    leaves = jax.tree_util.tree_leaves(tree, is_leaf)
    return sum(int(np.prod(x.shape if hasattr(x, "shape") else np.shape(x))) for x in leaves)


def stable_hash(text: str) -> int:
    """A 32-bit hash of a string: the same in every process, unlike Python's own."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def fold_path(key: jax.Array, path: str) -> jax.Array:
    """Folds a path into a random key, so that one site's draw never depends on which other sites there are."""
    return jax.random.fold_in(key, stable_hash(path))


def leaf_hash(leaf: Any) -> str:
    """sha256 over dtype, shape and bytes of one array."""
    # An NNX state holds its random keys too.
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.ascontiguousarray(np.asarray(leaf))
    digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    digest.update(array.view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def fingerprint(tree: Tree) -> str:
    """sha256 over the paths and leaves of the `params` collection; says whether two bases are the same."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(tree).items()):
        digest.update(f"{path}={leaf_hash(leaf)};".encode())
    return digest.hexdigest()
