import json
from dataclasses import replace

import pytest

from equipoise.layer import Capacity
from equipoise.models.config import STRATEGIES, DecoderConfig, MoEConfig
from equipoise.models.json_types import decode, encode
from equipoise.routing import BiasBalance, HighThenLow, SwitchLoss, TopK, ZLoss


class TestValidation:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"dim": 0}, r"dim: expected at least 1, got 0. Set DecoderConfig.dim"),
            ({"vocab_size": -3}, r"vocab_size: expected at least 1, got -3"),
            ({"dim": 30}, r"num_heads: expected a divisor of dim=30, got 4"),
            ({"num_kv_heads": 3}, r"num_kv_heads: expected a divisor of num_heads=4, got 3"),
            ({"num_kv_heads": 0}, r"num_kv_heads: expected a divisor of num_heads=4, got 0"),
            ({"head_dim": 7}, r"head_dim: expected a positive even number, got 7.*style='gpt2'"),
            ({"style": "gpt3"}, r"style: expected 'modern' or 'gpt2', got 'gpt3'"),
            ({"moe": None}, r"moe_layers: expected None without moe, got \(1, 2\)"),
            ({"moe_layers": (1, 3)}, r"moe_layers: expected ascending .*num_layers=3\), got \(1, 3\)"),
            ({"moe_layers": (-1,)}, r"moe_layers: expected ascending .*got \(-1,\)"),
            ({"moe_layers": (1, 1)}, r"moe_layers: expected ascending .*got \(1, 1\)"),
        ],
    )
    def test_decoder(self, make_config, overrides, message):
        with pytest.raises(ValueError, match=message):
            make_config(**overrides)

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"num_experts": 0}, r"num_experts: expected at least 1, got 0. Set MoEConfig.num_experts"),
            ({"shared_experts": -1}, r"shared_experts: expected 0 or more.*got -1"),
            ({"shared_gate": True}, r"shared_experts: .*at least 1 with shared_gate, got 0"),
        ],
    )
    def test_moe(self, overrides, message):
        with pytest.raises(ValueError, match=message):
            MoEConfig(**({"num_experts": 4, "hidden_dim": 8} | overrides))

    def test_odd_heads_are_fine_without_rotation(self, make_config):
        assert make_config(style="gpt2", head_dim=7).head_size == 7


class TestDerived:
    def test_defaults(self, make_config):
        config = make_config(num_kv_heads=None, moe_layers=None)
        assert (config.kv_heads, config.head_size, config.moe_layer_ids) == (4, 8, (0, 1, 2))
        assert make_config(moe=None, moe_layers=None).moe_layer_ids == ()


class TestJson:
    def test_round_trip(self, make_config):
        config = make_config()
        balance = (SwitchLoss(coef=HighThenLow(hold=5), scope="global"), ZLoss(coef=0.002), BiasBalance(rule="smooth"))
        router = TopK(k=3, score="sigmoid", scale=2.5, num_groups=2, top_groups=2)
        moe = replace(config.moe, router=router, balance=balance, capacity=Capacity(factor=1.5))
        for each in (config, replace(config, moe=moe), replace(config, moe=None, moe_layers=None)):
            assert DecoderConfig.from_json(each.to_json()) == each

    @pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda cls: cls.__name__)
    def test_every_strategy_survives(self, make_config, strategy):
        required = {"Constant": (0.1,), "LinearAnneal": (0.1, 0.0, 9), "CosineAnneal": (0.1, 0.0, 9)}
        value = strategy(*required.get(strategy.__name__, ()))
        assert decode(json.loads(json.dumps(encode(value, STRATEGIES))), STRATEGIES) == value

    def test_is_plain_and_tagged(self, make_config):
        data = json.loads(make_config().to_json())
        assert data["type"] == "DecoderConfig"
        assert data["moe"]["router"] | {"type": "TopK", "k": 2} == data["moe"]["router"]
        assert data["moe_layers"] == [1, 2]

    def test_unknown_type(self, make_config):
        text = make_config().to_json().replace("TopK", "TopSecret")
        with pytest.raises(ValueError, match=r"config: unknown type 'TopSecret', expected one of .*'TopK'"):
            DecoderConfig.from_json(text)

    def test_missing_type(self):
        with pytest.raises(ValueError, match=r"config: unknown type None"):
            DecoderConfig.from_json('{"dim": 8}')

    def test_unknown_field(self, make_config):
        text = make_config().to_json().replace('"rope_theta"', '"rope_beta"')
        with pytest.raises(ValueError, match=r"config: DecoderConfig has no \['rope_beta'\], expected .*rope_theta"):
            DecoderConfig.from_json(text)

    def test_values_are_checked_again(self, make_config):
        text = make_config().to_json().replace('"dim": 32', '"dim": 30')
        with pytest.raises(ValueError, match="num_heads: expected a divisor of dim=30"):
            DecoderConfig.from_json(text)

    def test_not_a_decoder(self):
        with pytest.raises(ValueError, match=r"type 'DecoderConfig', got tuple"):
            DecoderConfig.from_json("[1]")

    def test_a_foreign_object_is_refused(self, make_config):
        config = make_config()
        strange = replace(config, moe=replace(config.moe, balance=(object(),)))
        with pytest.raises(ValueError, match=r"config: expected numbers.*got object"):
            strange.to_json()
