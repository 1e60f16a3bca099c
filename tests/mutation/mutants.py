"""Small mistakes in the code, and the tests that must notice them: one line of the table each.

A mistake changes behaviour silently: nothing crashes, nothing is left out of the imports. `tests.mutation.run` makes
them, one at a time, in a copy of the package.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    name: unique. file: in src/equipoise. old: occurs there exactly once. new: stands there instead.
    tests: what to run, as pytest names it; at least one must fail. why: what the mistake means, a few words.
    """

    name: str
    file: str
    tests: tuple[str, ...]
    why: str
    old: str
    new: str


def _in(file: str, *tests: str) -> tuple[str, ...]:
    """Tests of one file."""
    return tuple(f"tests/{file}::{test}" for test in tests) or (f"tests/{file}",)


def _oracle(router: str, overflow: str = "dropless") -> tuple[str, ...]:
    """One layer beside the fp64 loop."""
    test = "test_output_and_gradients_equal_the_reference_loop"
    return _in("layer/test_router_oracle.py", f"{test}[{router}-{overflow}-lean]")


SELECTION = _in("routing/test_top_k.py", "TestSelection")
GOLDEN = _in("routing/test_golden_routing.py")
LOSSES = _in("routing/test_losses.py")
RULES = _in("routing/test_balancers.py", "TestRules")
STATE = _in("routing/test_balancers.py", "TestState")
QUANTILE = _in("routing/test_balancers.py", "TestQuantileBalance")
SCOPE = _in("layer/test_loss_scope.py")
CAPACITY = _in("layer/test_capacity.py")
OVERFLOW = _in("layer/test_overflow.py")
AUCTION = _in("layer/test_overflow.py", "test_next_choice_by_hand", "test_next_choice_is_the_reference_auction")
EVAL = _in("layer/test_exact_counts.py", "test_eval_is_counted_by_observers_but_never_by_balancers")
UPDATE = _in("layer/test_exact_counts.py", "test_update_takes_all_micro_batches_sums_over_ranks_and_starts_anew")
PADDING = _in("layer/test_exact_counts.py", "test_padding_is_never_counted")
COUNT = _in("ops/test_count.py")
ATTACH = _in("ops/test_attach_loss.py")
HISTOGRAM = _in("ops/test_histogram.py")
RAGGED = _in("ops/test_ragged.py")
SINKHORN = _in("ops/test_sinkhorn.py", "test_hand_worked", "test_marginals_after_many_iterations")
RECORDER = _in("monitor/test_recorder.py", "test_drops_are_those_of_the_plan")
MODE = _in("layer/test_mode.py")
POLICY = _in("recovery/test_policy.py")
DECISION = _in("routing/test_router_conformance.py", "TestDecision")
GRADIENT = _in("routing/test_router_conformance.py", "TestGradient::test_reaches_every_parameter_from_the_weights")
REPEATABLE = _in("routing/test_router_conformance.py", "TestRepeatable::test_eval_is_a_function_of_the_input")
IN_EVAL = _in("routing/test_router_traits.py", "TestBatchInvariance")
PLACE = _in("routing/test_router_traits.py", "TestPermutation::test_round_robin_looks_at_the_place_alone")
BIAS = _in("routing/test_router_traits.py", "TestBias")
SPARSITY = _in("routing/test_loss_conformance.py", "TestSparsity")
SIMILARITY = _in("routing/test_loss_conformance.py", "TestSimilarity")
FROZEN = _in("routing/test_adaptive_conformance.py", "TestFrozen")
COEFS = _in("routing/test_adaptive_rules.py", "TestDropRateCoef::test_by_hand", "TestSparsityCoef::test_by_hand")
RATES = _in("routing/test_adaptive_rules.py", "test_a_bias_stops_where_its_rate_ends")
HOLES = _in("mutation/test_holes.py")

# fmt: off
MUTANTS = (
    # ------------------------------------------------------------------------------------------ selection and weights
    Mutant("group-mask-zero", "routing/top_k.py", SELECTION, "experts of other groups count as 0, not as -inf",
           'float("-inf")).view(T, E)', "0.0).view(T, E)"),
    Mutant("group-worth-best", "routing/top_k.py", SELECTION, "a group is worth its best expert, not its best two",
           "topk(min(2, E // num_groups), dim=-1)", "topk(1, dim=-1)"),
    Mutant("worst-experts", "routing/top_k.py", SELECTION, "the k worst experts are chosen",
           "topk(config.k, dim=-1).indices", "topk(config.k, dim=-1, largest=False).indices"),
    Mutant("bias-in-weights", "routing/top_k.py", SELECTION, "a balancer's bias is in the weights",
           "scores_TE = scores_of(logits_TE, config.score)\n        selection",
           "scores_TE = scores_of(logits_TE, config.score) + (0 if bias_E is None else bias_E)\n        selection"),
    Mutant("ties-by-underflow", "routing/top_k.py", HOLES, "scores that underflow decide instead of logits",
           "selection_TE if grouped or bias_E is not None else logits_TE", "selection_TE"),
    Mutant("renormalise-missing", "routing/top_k.py", GOLDEN, "weights are not divided by their sum",
           '"sum" if config.renormalizes else "raw"', '"raw"'),
    Mutant("temperature-multiplies", "routing/top_k.py", SELECTION, "logits are multiplied with the temperature",
           "logits_TE = logits_TE / temperature", "logits_TE = logits_TE * temperature"),
    Mutant("probs-not-normalised", "routing/top_k.py", GOLDEN, "sigmoid scores pass for probabilities",
           'scores_TE if config.score == "softmax" else normalized(scores_TE)', "scores_TE"),
    Mutant("bias-on-probabilities", "routing/top_k.py", _in("layer/test_collapsed_layer.py"),
           "a softmax router's bias is added to probabilities",
           'return self.score == "softmax" and self.num_groups == 1', "return False"),
    Mutant("jitter-in-eval", "routing/top_k.py", _in("routing/test_top_k.py", "TestSwitch"), "jitter at inference",
           "if self.training and config.jitter:", "if config.jitter:"),
    Mutant("switch-init", "routing/switch.py", _in("routing/test_top_k.py", "TestSwitch"),
           "the initial standard deviation is a variance",
           "(self.init_scale / dim) ** 0.5", "self.init_scale / dim"),
    Mutant("scale-missing", "types.py", GOLDEN, "weights are not scaled",
           "return weights_TK if self.scale == 1.0 else self.scale * weights_TK", "return weights_TK"),
    Mutant("softmax-over-tokens", "types.py", GOLDEN, "chosen weights are normalised over tokens",
           "weights_TK.softmax(-1)", "weights_TK.softmax(0)"),
    Mutant("tokens-in-turn", "types.py", GOLDEN + _in("layer/test_capacity.py", "test_drops_by_hand"),
           "assignments are listed choice by choice, tokens token by token",
           ".floor_divide_(K)", ".remainder_(T)"),
    Mutant("mask-transposed", "types.py", _oracle("ReLURouting"), "weights of a mask are read expert by expert",
           "weights_TE[token_ids_N, expert_ids_N]", "weights_TE.t()[mask_TE.t()]"),
    Mutant("router-in-bf16", "ops/router_linear.py", _in("ops/test_router_linear.py"), "autocast reaches the router",
           "torch.autocast(device.type, enabled=False)", "torch.autocast(device.type, enabled=True)"),
    Mutant("router-in-models-dtype", "ops/router_linear.py", _in("ops/test_router_linear.py"),
           "a bf16 model has bf16 logits",
           "torch.promote_types(torch.promote_types(x_TD.dtype, weight_ED.dtype), torch.float32)",
           "torch.promote_types(x_TD.dtype, weight_ED.dtype)"),
    # ------------------------------------------------------------------------------------------ other routers
    Mutant("noise-in-eval", "routing/noisy_top_k.py", REPEATABLE, "noise at inference",
           "if self.training:", "if True:"),
    Mutant("noise-not-in-weights", "routing/noisy_top_k.py", GRADIENT, "noise decides, and is left out of the weights",
           'Preferences(ranking_TE, noisy_TE, "softmax")', 'Preferences(ranking_TE, logits_TE, "softmax")'),
    Mutant("expert-choice-over-tokens", "routing/expert_choice.py", _oracle("ExpertChoice"), "softmax over tokens",
           "logits_TE.softmax(-1)", "logits_TE.softmax(0)"),
    Mutant("expert-choice-floor", "routing/expert_choice.py", DECISION, "experts take too few tokens",
           "math.ceil(T * self.config.k / E)", "T * self.config.k // E"),
    Mutant("sinkhorn-in-eval", "routing/sinkhorn.py", IN_EVAL, "balanced at inference, over what is in the batch",
           "if self.training:", "if True:"),
    Mutant("sinkhorn-rows-only", "ops/sinkhorn.py", SINKHORN, "columns are never scaled",
           "log_v_E = -log_E - (z_TE + log_u_T1).logsumexp(0)", "log_v_E = -log_E.expand(E)"),
    Mutant("sinkhorn-wrong-share", "ops/sinkhorn.py", SINKHORN, "columns sum to 1/T",
           "log_v_E = -log_E", "log_v_E = -log_T"),
    Mutant("threshold-uncorrected", "routing/threshold.py", DECISION, "the average's start at 0 is not corrected",
           "self.running_E / (1 - self.config.ema ** self.updates.float()).clamp_min(1e-12)", "self.running_E"),
    Mutant("threshold-never-cold", "routing/threshold.py", DECISION, "no warm-up: thresholds of 0 decide at first",
           "torch.where(self.state.warm, ranking_TE > self.state.thresholds_E, best_TE)",
           "ranking_TE > self.state.thresholds_E"),
    Mutant("threshold-without-k", "routing/threshold.py", DECISION, "each expert takes 1/E of the tokens, not k/E",
           "num_tokens * self.config.k / len(self.running_E)", "num_tokens / len(self.running_E)"),
    Mutant("relu-abs", "routing/relu.py", DECISION, "negative logits activate experts",
           "logits_TE.relu()", "logits_TE.abs()"),
    Mutant("hash-duplicates", "routing/hash_tables.py", _in("routing/test_hash_tables.py"),
           "an id gets an expert twice",
           'torch.rand(shape, generator=generator, device="cpu").topk(k).indices',
           'torch.randint(num_experts, (shape[0], k), generator=generator, device="cpu")'),
    Mutant("hash-ids-weigh-alike", "routing/hash_tables.py", _in("routing/test_hash_tables.py"),
           "a balanced table ignores frequencies", "(load + frequency, expert)", "(load + 1, expert)"),
    Mutant("hash-weights-sum-to-k", "routing/hash_router.py", DECISION, "equal weights are 1, not 1/k",
           "config.scale / k", "config.scale"),
    Mutant("two-tier-open", "routing/two_tier.py", HOLES, "experts of other groups stay in reach",
           'ranking_TE.masked_fill(~chosen_TG1.expand_as(within_TGe).flatten(1), float("-inf"))', "ranking_TE"),
    Mutant("two-tier-one-factor", "routing/two_tier.py", _oracle("TwoTier"), "the group's probability is left out",
           "joint_TGe = group_log_TG.unsqueeze(-1) + within_TGe", "joint_TGe = within_TGe"),
    Mutant("round-robin-neighbours", "routing/round_robin.py", PLACE, "token t starts at expert t, not at t k",
           "torch.arange(T * k, device=x_TD.device).view(T, k) % E",
           "(torch.arange(T, device=x_TD.device)[:, None] + torch.arange(k, device=x_TD.device)) % E"),
    # ------------------------------------------------------------------------------------------ losses
    Mutant("switch-without-e", "routing/losses.py", GOLDEN, "the factor E is missing",
           "return num_experts * (share_E", "return (share_E"),
    Mutant("switch-mean-of-all", "routing/losses.py", GOLDEN, "the mean probability is over experts too",
           "probs_TE.mean(0)", "probs_TE.mean()"),
    Mutant("switch-not-by-k", "routing/losses.py", GOLDEN, "shares sum to k, not to 1",
           "counts_E / counts_E.sum().clamp_min(1))", "counts_E / decision.num_tokens)"),
    Mutant("switch-soft-load", "routing/losses.py", LOSSES, "the load has a gradient",
           "(share_E.to(probs_TE.dtype) * probs",
           "((share_E.to(probs_TE.dtype) + probs_TE.mean(0) - probs_TE.mean(0).detach()) * probs"),
    Mutant("global-is-local", "routing/losses.py", LOSSES + SCOPE, "the global load is the micro-batch's",
           'inputs.global_counts_E if self.scope == "global" else None', "None"),
    Mutant("sequences-weigh-alike", "routing/losses.py", LOSSES + SCOPE, "short sequences count as much as long ones",
           "(share_TE * decision.probs_TE).sum() / T",
           "(share_TE * decision.probs_TE / inputs.sequence_ids_T.bincount()[inputs.sequence_ids_T, None]).sum() / B"),
    Mutant("cv-unbiased", "routing/losses.py", GOLDEN, "the variance is divided by E - 1",
           "values_E.var(unbiased=False)", "values_E.var()"),
    Mutant("importance-of-probs", "routing/losses.py", GOLDEN, "importance sums probabilities, not weights",
           "importance_E.index_add(0, decision.expert_ids_N, decision.weights_N)", "decision.probs_TE.sum(0)"),
    Mutant("load-in-probabilities", "routing/losses.py", LOSSES, "logits are compared with probabilities",
           "decision.logits_TE, decision.logits_TE.detach()",
           "decision.logits_TE, decision.logits_TE.detach().softmax(-1)"),
    Mutant("load-thresholds-swapped", "routing/losses.py", GOLDEN, "each side has the other's threshold",
           "torch.where(selected_TE, best_left_out_T1, last_selected_T1)",
           "torch.where(selected_TE, last_selected_T1, best_left_out_T1)"),
    Mutant("z-loss-sum", "routing/losses.py", GOLDEN, "a sum over tokens, not a mean",
           ".square().sum() / max(logits_TE.shape[0], 1)", ".square().sum()"),
    Mutant("z-loss-not-squared", "routing/losses.py", GOLDEN, "the square is missing",
           "logsumexp(-1).square()", "logsumexp(-1).abs()"),
    Mutant("similarity-no-identity", "routing/similarity.py", SIMILARITY, "long rows are the aim, not orthonormal ones",
           "(gram_EE - torch.eye(len(gram_EE), dtype=gram_EE.dtype, device=gram_EE.device)).abs()", "gram_EE.abs()"),
    Mutant("sparsity-without-k", "routing/sparsity.py", SPARSITY, "the load is not divided by k",
           "counts_E / (T * inputs.k)", "counts_E / T"),
    Mutant("attach-nothing", "ops/attach_loss.py", ATTACH, "the loss gets the gradient 0",
           "torch.ones_like(loss)", "torch.zeros_like(loss)"),
    Mutant("attach-scaled", "ops/attach_loss.py", ATTACH, "the loss's gradient follows the output's",
           "grads[0], torch.ones_like(loss)", "grads[0], torch.ones_like(loss) * grads[0].float().mean()"),
    Mutant("share-ignored", "layer/moe.py", SCOPE, "micro-batches' losses are not weighted by their share",
           "scope.share * boost", "boost"),
    Mutant("loss-in-eval", "layer/moe.py", SCOPE, "losses are attached at inference",
           "if self.training and torch.is_grad_enabled():", "if torch.is_grad_enabled():"),
    Mutant("layers-share-counts", "types.py", SCOPE, "each layer sees the counts of all",
           "self.counts[index]", "self.counts.sum(0)"),
    Mutant("convert-without-k", "routing/convert.py", _in("routing/test_convert.py"), "transformers' shares sum to k",
           "return k / num_moe_layers", "return 1 / num_moe_layers"),
    # ------------------------------------------------------------------------------------------ what adapts
    Mutant("bias-wrong-way", "routing/balancers.py", GOLDEN, "busy experts are preferred",
           "((mean - counts_E) /", "((counts_E - mean) /"),
    Mutant("bias-not-centred", "routing/balancers.py", RULES, "the common part drifts",
           "return step_E - step_E.mean()", "return step_E"),
    Mutant("smooth-gains", "routing/balancers.py", GOLDEN, "momentum adds up instead of averaging",
           "(1 - beta) * (step_E - step_E.mean())", "(step_E - step_E.mean())"),
    Mutant("quantile-at-k", "routing/balancers.py", GOLDEN, "an expert must beat the k-th score, not the next",
           "topk(k + 1, dim=-1)", "topk(k, dim=-1)"),
    Mutant("quantile-rank", "routing/balancers.py", GOLDEN, "the q-th largest margin, not the next",
           "[min(T * k // E, T - 1)]", "[min(T * k // E, T - 1) - 1]"),
    Mutant("quantile-forgets-bias", "routing/balancers.py", QUANTILE, "margins with the bias pass for those without",
           "len(self.bias_E)) - self.bias_E", "len(self.bias_E))"),
    Mutant("quantile-ema-swapped", "routing/balancers.py", QUANTILE, "the old bias has the new one's part",
           "torch.lerp(target_E, self.bias_E, self.config.ema)", "torch.lerp(self.bias_E, target_E, self.config.ema)"),
    Mutant("on-demand-at-once", "routing/balancers.py", QUANTILE, "a repair that is held ready acts by itself",
           "self.active & (num_tokens > 0)", "num_tokens > 0"),
    Mutant("pending-kept", "routing/adaptive.py", UPDATE + STATE, "old counts are counted again",
           "        self.pending.zero_()\n", ""),
    Mutant("frozen-moves", "routing/adaptive.py", FROZEN, "what is frozen adapts",
           "torch.where(self.frozen, before[name], buffer)", "buffer"),
    Mutant("state-in-bf16", "routing/adaptive.py", STATE, "a bias of 1 swallows steps of 0.001",
           "return result if result.dtype == tensor.dtype else tensor.to(result.device)", "return result"),
    Mutant("update-in-eval", "layer/moe.py", EVAL, "validation moves the balancer",
           "if self.training:  # also", "if True:  # also"),
    Mutant("step-ignored", "layer/moe.py", RATES, "scheduled rates stay at their first value",
           "state.update(step)", "state.update()"),
    Mutant("drop-rate-of-tokens", "routing/coefficients.py", COEFS, "fully dropped tokens count once more",
           '[count for reason, count in drops.items() if reason != "tokens"]', "list(drops.values())"),
    Mutant("drop-rate-unlimited", "routing/coefficients.py", COEFS, "the coefficient has no maximum",
           ".clamp_max(config.maximum)", ""),
    Mutant("sparsity-wrong-way", "routing/coefficients.py", COEFS, "the penalty rises when too few are active",
           "assignments > self.top_k * tokens", "assignments < self.top_k * tokens"),
    Mutant("no-hold", "routing/schedules.py", _in("routing/test_schedules.py"), "the high value is not held",
           "(step - self.hold)", "(step)"),
    # ------------------------------------------------------------------------------------------ counting
    Mutant("recompute-counts", "ops/count.py", COUNT, "tokens are counted again when a forward is recomputed",
           "return bool(torch._C._current_graph_task_id() != -1)", "return False"),
    Mutant("padding-routed", "layer/tokens.py", PADDING, "padding is routed and counted",
           "kept_T = (~padding_mask)", "kept_T = torch.ones_like(padding_mask)"),
    Mutant("padding-shifts-sequences", "layer/tokens.py", SCOPE, "tokens after padding pass for the sequence before",
           "else ids_T[self.kept_T]", "else ids_T[: len(self.kept_T)]"),
    Mutant("bins-off-by-one", "ops/histogram.py", HISTOGRAM, "values count in the next bin",
           ".long().clamp_(", ".long().add_(1).clamp_("),
    Mutant("bins-not-interpolated", "ops/histogram.py", HISTOGRAM, "quantiles jump from edge to edge",
           "torch.lerp(edges[index_E], edges[index_E + 1], fraction_E)", "edges[index_E]"),
    Mutant("recorder-after-drops", "monitor/recorder.py", RECORDER, "the load is what was computed",
           "_cat([decision.expert_ids_N for decision in decisions])",
           "_cat([torch.arange(self.num_experts).repeat_interleave(routed.plan.counts_e) for routed in seen])"),
    Mutant("recorder-mean-of-means", "monitor/recorder.py",
           _in("monitor/test_recorder.py", "test_losses_are_averages_over_tokens"),
           "losses are averaged without their tokens",
           "routed.losses[name] * routed.decision.num_tokens", "routed.losses[name]"),
    Mutant("recorder-never-anew", "monitor/recorder.py", _in("monitor/test_recorder.py", "test_flush_starts_anew"),
           "windows overlap", "        self._buffers.words.zero_()", "        pass"),
    # ------------------------------------------------------------------------------------------ capacity and overflow
    Mutant("capacity-floor", "layer/capacity.py", CAPACITY, "rounded down",
           "math.ceil(fair * (1 - 1e-12))", "int(fair * (1 + 1e-12))"),
    Mutant("capacity-noise", "layer/capacity.py", HOLES, "rounding errors add a place",
           "math.ceil(fair * (1 - 1e-12))", "math.ceil(fair)"),
    Mutant("capacity-zero", "layer/capacity.py", CAPACITY, "none when there are no tokens, and 1 is promised",
           "max(1, rounded_up))", "rounded_up)"),
    Mutant("capacity-above-t", "layer/capacity.py", CAPACITY, "more places than tokens",
           "min(max(num_tokens, 1), max(1, rounded_up))", "max(1, rounded_up)"),
    Mutant("drops-in-eval", "layer/moe.py", CAPACITY, "inference drops",
           "decision, self.training)", "decision, True)"),
    Mutant("factor-in-eval", "layer/capacity.py", OVERFLOW, "a hard cap switches the factor on at inference",
           "if training or self.at_inference:", "if True:"),
    Mutant("weakest-first", "layer/overflow.py", CAPACITY, "the smallest weights are kept",
           "argsort(descending=True, stable=True)", "argsort(stable=True)"),
    Mutant("order-for-place", "layer/overflow.py", CAPACITY, "an order passes for places",
           "torch.empty_like(order_N).scatter_(0, order_N, torch.arange(N, device=device))", "order_N"),
    Mutant("one-place-more", "layer/overflow.py", CAPACITY, "experts take one more than the limit",
           "keep_N = rank_N < limit", "keep_N = rank_N <= limit"),
    Mutant("hard-cap-hides", "layer/overflow.py", OVERFLOW, "what a hard cap drops counts as the factor's",
           "(~keep_N & (rank_N >= by_factor)).sum()", "(~keep_N).sum()"),
    Mutant("half-lost-is-lost", "layer/overflow.py", CAPACITY, "tokens with one expert left count as fully dropped",
           "(kept_T == 0).sum()", "(kept_T <= 1).sum()"),
    Mutant("moved-and-lost", "layer/overflow.py", AUCTION, "what found no place counts as moved",
           "(keep_N & ~first_N).sum()", "(~first_N).sum()"),
    Mutant("spill-detached", "layer/overflow.py", _oracle("TopK", "shared"), "the spilled weight has no gradient",
           "index_add(0, decision.token_ids_N, weights_N)", "index_add(0, decision.token_ids_N, weights_N.detach())"),
    Mutant("spill-without-shared", "layer/moe.py", OVERFLOW, "the spilled weight replaces the shared expert's own",
           "(1.0 if own_T1 is None else own_T1) + spilled_T", "spilled_T"),
    Mutant("moved-old-weights", "types.py", _oracle("TopK", "next_choice"),
           "moved assignments keep the weight of the full expert",
           "expert_ids_N=ids_TK.reshape(-1), weights_N=weights_N)", "expert_ids_N=ids_TK.reshape(-1))"),
    Mutant("auction-forgets-places", "ops/next_choice.py", HOLES, "a token gets an expert twice",
           "used_TE = _used(token_M, asked_M, taken_M, open_ME)", "used_TE = open_ME"),
    Mutant("auction-forgets-choices", "ops/next_choice.py", HOLES, "a token gets what it has already",
           'ranking_TE[token_M].scatter(1, ids_TK[token_M], float("-inf"))', "ranking_TE[token_M]"),
    Mutant("auction-overfills", "ops/next_choice.py", AUCTION, "experts take one more than they have room for",
           "rank_M < room_E[asked_M]", "rank_M <= room_E[asked_M]"),
    Mutant("auction-last-first", "ops/next_choice.py", AUCTION, "the last in the order asks first",
           "place_TK.view(-1)[seeking_M].argsort()", "place_TK.view(-1)[seeking_M].argsort(descending=True)"),
    Mutant("drop-rate-of-tokens-lost", "layer/drop_rate.py", _in("layer/test_drop_rate.py", "test_hand_worked"),
           "lost assignments of one expert pass for the share of all", "k / num_experts, limit) / fair",
           "k / num_experts, limit) / num_tokens"),
    # ------------------------------------------------------------------------------------------ rows and experts
    Mutant("dropped-computed", "ops/ragged.py", RAGGED, "dropped rows are computed",
           "keys_N = expert_ids_N if keep_N is None else torch.where(keep_N, expert_ids_N, num_experts)",
           "keys_N = expert_ids_N"),
    Mutant("weights-unsorted", "ops/ragged.py", RAGGED, "rows are sorted, their weights are not",
           "weights_R=weights_N.index_select(0, order_R)", "weights_R=weights_N"),
    # ------------------------------------------------------------------------------------------ repair
    Mutant("bias-not-added", "layer/moe.py", MODE, "a repair's bias takes the place of the balancer's",
           "(0.0 if bias_E is None else bias_E)", "0.0"),
    Mutant("diverted-weight-lost", "layer/admission.py", MODE, "the stand-in computes nothing of what is diverted",
           "spilled(decision, ~diverted_N)", "spilled(decision, diverted_N | True)"),
    Mutant("shut-or-share", "layer/admission.py", MODE, "an expert is shut only for tokens that are diverted anyway",
           "diverted_T[decision.token_ids_N] | shut_E", "diverted_T[decision.token_ids_N] & shut_E"),
    Mutant("dense-and-shared", "layer/moe.py", MODE, "what is diverted is computed twice",
           "spilled_T if force.dense is None else None", "spilled_T"),
    Mutant("boost-of-losses-only", "routing/balancers.py", MODE, "a boost does not reach the bias's steps",
           "self.boost * value_at", "1.0 * value_at"),
    Mutant("one-round-of-bias", "recovery/actions.py",
           _in("recovery/test_actions.py", "test_the_bias_balances_whatever_the_router_prefers"),
           "a saturated router gets the bias of the first round",
           "CLOSE_ENOUGH, ROUNDS = 0.02, 50", "CLOSE_ENOUGH, ROUNDS = 0.02, 1"),
    Mutant("rungs-again", "recovery/policy.py", POLICY, "a rung that was undone is tried again",
           "next((kind for kind in rungs if kind not in tried), PAGE)", "next(iter(rungs), PAGE)"),
    Mutant("input-repaired", "recovery/policy.py", POLICY, "an undamaged model is repaired",
           "if situation.damaged is False:", "if situation.damaged is None:"),
    Mutant("budget-plus-one", "recovery/policy.py", POLICY, "one attempt more than the budget",
           "for kind in tried) >= budget", "for kind in tried) > budget"),
    Mutant("worse-is-kept", "recovery/recovery.py", _in("recovery/test_recovery.py",
           "test_an_action_that_makes_things_worse_is_undone_by_itself"), "a repair that makes things worse stays",
           "if after.loss > before + tolerance:", "if after.loss > before + 100 * tolerance + 100:"),
    Mutant("patience-endless", "recovery/recovery.py", _in("recovery/test_recovery.py",
           "test_a_repair_that_does_not_help_is_undone_when_patience_ends"), "a useless repair stays on trial",
           "elif trial.flushes >= self._patience.trial_flushes:", "elif trial.flushes >= 1000:"),
    Mutant("undo-forgotten", "recovery/recovery.py", _in("recovery/test_recovery.py",
           "test_an_action_that_makes_things_worse_is_undone_by_itself"), "what is called undone is still in force",
           "                trial.change.undo()\n", "                pass\n"),
    Mutant("warnings-at-once", "recovery/recovery.py", _in("recovery/test_recovery.py",
           "test_a_warning_is_repaired_only_when_it_lasts"), "what may go away by itself is repaired at once",
           "case.waited >= self._patience.warning_flushes", "case.waited >= 1"),
    Mutant("relapse-forgotten", "recovery/case.py", _in("recovery/test_recovery.py",
           "test_a_repair_that_did_not_last_is_followed_by_the_next_rung"), "what did not last is the first again",
           "if step - at <= relapse_steps]", "if step - at < 0]"),
    Mutant("canary-is-traffic", "recovery/recovery.py", _in("recovery/test_recovery.py",
           "test_held_out_text_is_no_traffic"), "held-out text passes for recent traffic",
           "silence = recent.paused() if recent is not None else nullcontext()", "silence = nullcontext()"),
    Mutant("raw-weights-twice", "recovery/dense_path.py",
           _in("recovery/test_dense_path.py", "test_raw_weights_are_part_of_the_target"),
           "a stand-in learns the combine weight, and is weighted again",
           "layer.experts.activation) * weight_T[:, None]", "layer.experts.activation)"),
    Mutant("merge-without-load", "recovery/dense_path.py", _in("recovery/test_dense_path.py", "test_merging_by_hand"),
           "experts are averaged whatever their load", "part = weights / weights.sum().clamp_min(1e-12)",
           "part = torch.ones_like(weights) / len(weights)"),
    Mutant("stand-in-draws", "recovery/dense_path.py",
           _in("recovery/test_dense_path.py", "test_building_draws_no_random_numbers"),
           "building a stand-in moves the run's random numbers",
           'with torch.device("meta"):', 'with torch.device("cpu"):'),
    Mutant("hot-is-dead", "recovery/weights.py",
           _in("recovery/test_actions.py", "test_reseeding_copies_the_busiest_expert_with_noise_into_the_dead_ones"),
           "the idlest expert is copied",
           "return max(set(range(num_experts))", "return min(set(range(num_experts))"),
    # ------------------------------------------------------------------------------------------ serving
    Mutant("prefix-of-any-parent", "serve/blocks.py", _in("serve/test_blocks.py"),
           "blocks are kept without what comes before them", "key = (prefix, _packed(tokens))",
           "key = (ROOT, _packed(tokens))"),
    Mutant("whole-prompt-cached", "serve/scheduler.py",
           _in("serve/test_engine.py", "test_a_shared_prefix_changes_nothing"),
           "a prompt that is all there leaves no token to compute", "sequence.tokens[:-1]", "sequence.tokens"),
    Mutant("old-weights-in-cache", "serve/engine.py", _in("serve/test_engine.py",
           "test_a_prefix_of_old_weights_is_not_used_again"), "keys of old weights are used with new ones",
           "        self.pool.forget_all()\n", "        pass\n"),
    Mutant("credit-for-absence", "serve/scheduler.py", _in("serve/test_scheduler.py",
           "test_who_was_away_brings_no_credit_along"), "a client that comes late goes before all others",
           "self._served[client] = min(self._served.values(), default=0)", "self._served[client] = 0"),
    Mutant("first-gives-way", "serve/scheduler.py", _in("serve/test_scheduler.py"),
           "whoever came earliest of those who can gives way, not the last",
           "self.retract([max(victims, key", "self.retract([min(victims, key"),
    Mutant("one-draw-for-all", "serve/sampling.py", _in("serve/test_sampling.py"),
           "every token of an answer is drawn with the same number", "counter=position", "counter=0"),
    Mutant("others-keys-seen", "serve/paged_cache.py", _in("serve/test_engine.py", "test_batched_equals_single"),
           "a sequence sees what is in its last block after its end",
           "torch.arange(width * kv.block_size, device=kv.device) >= ends_B",
           "torch.arange(width * kv.block_size, device=kv.device) > ends_B"),
    Mutant("stop-is-shown", "serve/text.py", _in("serve/test_text.py"), "the beginning of a stop is given away",
           "return self._take(len(self._held) - self._undecided())", "return self._take(len(self._held))"),
    Mutant("worse-weights-stay", "serve/weights.py", _in("serve/live/test_operator.py",
           "test_worse_weights_are_put_back"), "weights that are worse stay in service",
           "            self._put_back(done)\n            raise", "            raise"),
    Mutant("reload-unjudged", "serve/weights.py", _in("serve/live/test_operator.py",
           "test_worse_weights_are_put_back"), "new weights are taken as they are",
           "if math.isfinite(before) and after > before + most:", "if False:"),
    Mutant("proposals-are-made", "serve/care.py", _in("serve/live/test_care.py", "test_without_leave_it_only_proposes"),
           "repairs are made without leave", "act=config.recover,", "act=True,"),
    Mutant("backlog-lost", "monitor/recorder.py", _in("monitor/test_recorder.py", "TestSmallForwards"),
           "single tokens that wait are not counted",
           "        if self._waiting:\n            self._sums.add(self._waiting)\n", ""),
    Mutant("pool-per-layer", "monitor/window.py", _in("monitor/test_window.py"),
           "a layer goes on adding old flushes though it has enough",
           "found |= total.by_layer(_with_enough(total, min_expected) - found.keys())",
           "found |= total.by_layer(_with_enough(total, min_expected))"),
)
# fmt: on
