"""Attention and caches by their rules, in NumPy and float64, with no code of the library."""

import numpy as np


def visible(
    heads,
    queries,
    positions,
    offsets,
    *,
    causal=True,
    window=None,
    q_segment_ids=None,
    kv_segment_ids=None,
    lengths=None,
    block_mask=None,
    ancestor_mask=None,
):
    """bool [B, N, T, S] and logical distances [B, T, S]; positions int [B, S] (negative: unused), offsets [B]."""
    batch, keys = positions.shape
    if ancestor_mask is not None:
        ancestor_mask = np.broadcast_to(ancestor_mask, (batch, queries, queries))
    if isinstance(window, int):
        window = (window - 1, 0)
    left, right = window or (None, None)
    seen = np.zeros((batch, heads, queries, keys), bool)
    distance = np.zeros((batch, queries, keys), int)
    for b in range(batch):
        depth = np.arange(queries) if ancestor_mask is None else ancestor_mask[b].sum(-1) - 1
        for t in range(queries):
            own = offsets[b] + depth[t]
            for s in range(keys):
                place = positions[b, s]
                node = place - offsets[b]
                in_tree = ancestor_mask is not None and 0 <= node < queries
                far = (offsets[b] + depth[node] if in_tree else place) - own
                distance[b, t, s] = far
                ok = place >= 0 and (lengths is None or place < lengths[b])
                if in_tree:
                    ok = ok and ancestor_mask[b, t, node]
                elif causal:
                    ok = ok and far <= 0
                ok = ok and (left is None or far >= -left) and (right is None or far <= right)
                if q_segment_ids is not None:
                    ok = ok and q_segment_ids[b, t] == kv_segment_ids[b, s]
                for n in range(heads):
                    cell = True
                    if block_mask is not None:
                        cells = block_mask if block_mask.ndim == 2 else block_mask[n]
                        rows, columns = cells.shape
                        cell = cells[t // -(-queries // rows), s // -(-keys // columns)]
                    seen[b, n, t, s] = ok and cell
    return seen, distance


def attend(q, k, v, seen, distance, *, softcap=None, sinks=None, alibi_slopes=None, scale=None):
    """out [B, N, T, Dv] and lse [B, N, T]; hidden keys are never read."""
    batch, heads, queries, dim = q.shape
    share = heads // k.shape[1]
    out = np.zeros((batch, heads, queries, v.shape[-1]))
    lse = np.full((batch, heads, queries), -np.inf)
    for b, n, t in np.ndindex(batch, heads, queries):
        at = seen[b, n, t]
        x = k[b, n // share, at].astype(np.float64) @ q[b, n, t].astype(np.float64)
        x = x * (dim**-0.5 if scale is None else scale)
        if softcap is not None:
            x = softcap * np.tanh(x / softcap)
        if alibi_slopes is not None:
            x = x + float(alibi_slopes[n]) * distance[b, t, at]
        every = x if sinks is None else np.append(x, float(sinks[n]))
        if every.size:
            peak = every.max()
            lse[b, n, t] = peak + np.log(np.exp(every - peak).sum())
            out[b, n, t] = np.exp(x - lse[b, n, t]) @ v[b, n // share, at].astype(np.float64)
    return out, lse


def attention(q, k, v, *, q_offset=0, softcap=None, sinks=None, alibi_slopes=None, scale=None, **rules):
    """What `flash_attention` should return, and what sees what."""
    batch, heads, queries, _ = q.shape
    positions = np.broadcast_to(np.arange(k.shape[2]), (batch, k.shape[2]))
    offsets = np.broadcast_to(q_offset, (batch,))
    seen, distance = visible(heads, queries, positions, offsets, **rules)
    terms = dict(softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, scale=scale)
    return *attend(q, k, v, seen, distance, **terms), seen


def decode(q, k, v, lengths, *, ring=False, window=None, ancestor_mask=None, k_scale=None, v_scale=None, **terms):
    """What `flash_decode` should return for one layer, and what sees what."""
    batch, heads, queries, _ = q.shape
    slots = k.shape[2]
    positions = np.tile(np.arange(slots), (batch, 1))
    if ring:
        positions[:] = -1
        for b in range(batch):
            for position in range(max(0, lengths[b] - slots), lengths[b]):
                positions[b, position % slots] = position
    rules = dict(window=window, ancestor_mask=ancestor_mask, lengths=lengths)
    seen, distance = visible(heads, queries, positions, lengths - queries, **rules)
    if k_scale is not None:
        k = k.astype(np.float64) * k_scale[..., None]
    if v_scale is not None:
        v = v.astype(np.float64) * v_scale[..., None]
    return *attend(q, k, v, seen, distance, **terms), seen


def append(cache, new, layer, starts, counts, ring):
    """What `cache_append` should return."""
    cache = cache.copy()
    slots = cache.shape[3]
    for b, start in enumerate(starts):
        for t in range(counts[b]):
            slot = (start + t) % slots if ring else start + t
            if 0 <= slot < slots:
                cache[layer, b, :, slot] = new[b, :, t]
    return cache


def poisoned(x, used):
    """x with nan in the rows that are not used."""
    return np.where(used[..., None], x, np.nan).astype(x.dtype)


def used_keys(seen, groups):
    """bool [B, K, S] from [B, N, T, S]: keys that some query sees."""
    batch, _, _, keys = seen.shape
    return seen.reshape(batch, groups, -1, keys).any(2)
