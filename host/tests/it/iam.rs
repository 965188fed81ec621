//! Checks that docs/iam.md is true: its policies allow exactly the Kinesis operations that the code calls.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::support::{host_sources, root};

/// Operations of the API, by their names in policies.
///
/// Source: API reference, "Actions".
const OPERATIONS: &str = "AddTagsToStream CreateStream DecreaseStreamRetentionPeriod \
    DeleteResourcePolicy DeleteStream DeregisterStreamConsumer DescribeAccountSettings \
    DescribeLimits DescribeStream DescribeStreamConsumer DescribeStreamSummary \
    DisableEnhancedMonitoring EnableEnhancedMonitoring GetRecords GetResourcePolicy \
    GetShardIterator IncreaseStreamRetentionPeriod ListShards ListStreamConsumers ListStreams \
    ListTagsForResource ListTagsForStream MergeShards PutRecord PutRecords PutResourcePolicy \
    RegisterStreamConsumer RemoveTagsFromStream SplitShard StartStreamEncryption \
    StopStreamEncryption SubscribeToShard TagResource UntagResource UpdateAccountSettings \
    UpdateMaxRecordSize UpdateShardCount UpdateStreamMode UpdateStreamWarmThroughput";
/// Actions of other services that the page may allow.
const OTHER_ACTIONS: [&str; 3] = ["kms:Decrypt", "kms:GenerateDataKey", "sts:AssumeRole"];

/// Returns the JSON blocks of the page.
fn policies() -> Vec<Value> {
    let page = std::fs::read_to_string(root().join("docs/iam.md")).expect("the page");
    let blocks = page.split("```json\n").skip(1);
    let text = blocks.map(|block| block.split("```").next().unwrap_or_default());
    text.map(|text| serde_json::from_str(text).expect(text)).collect()
}

/// Returns all actions that a policy allows.
fn actions(policy: &Value) -> impl Iterator<Item = &str> {
    let statements = policy["Statement"].as_array().expect("statements").iter();
    statements
        .flat_map(|statement| statement["Action"].as_array().expect("actions"))
        .map(|action| action.as_str().expect("an action"))
}

/// Returns the sources of the crates, without the tests in them.
fn code() -> String {
    let sources = host_sources().into_iter().filter(|(path, _)| !path.starts_with("host/tests"));
    sources
        .map(|(_, text)| text.split("#[cfg(test)]").next().unwrap_or_default().to_owned())
        .collect()
}

/// Returns the name of the client's method: `ListShards` is `list_shards`.
fn method(operation: &str) -> String {
    let mut name = String::new();
    for letter in operation.chars() {
        if letter.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_lowercase());
    }
    name
}

#[test]
fn the_policies_allow_what_the_code_calls_and_no_more() {
    let text = code();
    let called: BTreeSet<&str> = OPERATIONS
        .split_whitespace()
        .filter(|operation| text.contains(&format!(".{}()", method(operation))))
        .collect();
    assert!(called.contains("GetRecords"), "the calls are found: {called:?}");
    let policies = policies();
    let allowed: BTreeSet<&str> = policies
        .iter()
        .flat_map(actions)
        .filter_map(|action| action.strip_prefix("kinesis:"))
        .collect();
    let without: Vec<_> = called.difference(&allowed).collect();
    assert!(without.is_empty(), "docs/iam.md does not allow {without:?}");
    let unused: Vec<_> = allowed.difference(&called).collect();
    assert!(unused.is_empty(), "docs/iam.md allows {unused:?}, which nothing calls");
}

#[test]
fn the_policies_are_policies() {
    for policy in policies() {
        assert_eq!(policy["Version"], "2012-10-17", "{policy}");
        for action in actions(&policy) {
            let is_known = action.starts_with("kinesis:") || OTHER_ACTIONS.contains(&action);
            assert!(is_known, "{action} in {policy}");
        }
        for statement in policy["Statement"].as_array().expect("statements") {
            assert_eq!(statement["Effect"], "Allow", "{policy}");
            let is_trust = statement.get("Principal").is_some();
            assert_ne!(is_trust, statement.get("Resource").is_some(), "one of both: {policy}");
            assert_ne!(statement["Resource"], "*", "the smallest policy names what it is for");
        }
    }
}
