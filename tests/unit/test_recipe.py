from shardq.recipe import make_recipe


def test_order_of_rules_is_part_of_what_a_recipe_is() -> None:
    """The first rule that hits wins, so another order is another output, and must not resume this one."""
    eight, two = ("**.down_proj", {"bits": 8}), ("re:.*proj", {"bits": 2})
    one = make_recipe("W4A16", layer_config=dict([eight, two]))
    other = make_recipe("W4A16", layer_config=dict([two, eight]))
    assert one.as_dict() != other.as_dict()
    assert one.as_dict()["layer_config"] == [["glob:**.down_proj", {"bits": 8}], ["regex:re:.*proj", {"bits": 2}]]


def test_dialect_is_part_of_what_a_recipe_is() -> None:
    rules = {"down_proj": {"bits": 8}}
    assert make_recipe("W4A16", layer_config=rules).as_dict() != (
        make_recipe("W4A16", layer_config=rules, ignore_dialect="auto-round").as_dict()
    )
