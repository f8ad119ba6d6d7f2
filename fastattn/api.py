from fastattn import _core


def attention(query, key, value, *, scale=None, causal=False, query_offset=None, window=None, mask=None, bias=None,
    alibi_slopes=None, softcap=None, sinks=None, key_lengths=None, out=None, return_lse=False, return_weights=False, num_threads=None):
    return _core.attention(query, key, value, scale, causal, query_offset, window, mask, bias, alibi_slopes, softcap,
                           sinks, key_lengths, out, return_lse, return_weights, num_threads)
Plan=plan=get_num_threads=set_num_threads=show_config=None
