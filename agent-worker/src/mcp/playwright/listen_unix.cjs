// Preloaded into Playwright MCP (node --require). The server knows only TCP ports, and a TCP port on loopback is
// within reach of every page that the browser shows. This makes its one listener a Unix socket, which no page can
// name, and refuses every other TCP listener of the process.
'use strict';
const net = require('net');

const path = process.env.ESPALIER_MCP_SOCKET;
delete process.env.ESPALIER_MCP_SOCKET;
const listen = net.Server.prototype.listen;
const address = net.Server.prototype.address;
let http = null;

net.Server.prototype.listen = function (first, ...rest) {
  const isTcp = typeof first === 'number' || (first && typeof first === 'object' && first.path === undefined);
  if (!isTcp)
    return listen.call(this, first, ...rest);
  if (http !== null || !path)
    throw new Error('this process opens no TCP port');
  http = this;
  return listen.call(this, path);
};

// The server insists on an IP address to build the value that it compares with the Host header.
net.Server.prototype.address = function () {
  return this === http ? { address: '127.0.0.1', family: 'IPv4', port: 1 } : address.call(this);
};
