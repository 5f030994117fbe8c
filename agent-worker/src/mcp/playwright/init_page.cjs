// Loaded by Playwright MCP for each page. After the crash of a page Playwright MCP goes on with a blank one; a rollout
// would take it for the site. Closing the context makes the loss final, and the worker sees the new context begin.
'use strict';
exports.default = async ({ page }) => {
  page.on('crash', () => page.context().close().catch(() => {}));
};
